"""transformers' Trainer, which clips by accelerate, and trl's; the callback."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import check_reached

import fastclip

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from fastclip.integrations.transformers import GradClip  # noqa: E402


def model() -> Any:
    torch.manual_seed(1)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


def rows(count: int = 200) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(64, (count, 12), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder: Path, steps: int, **how: Any) -> dict[str, Any]:
    quiet = {"disable_tqdm": True, "report_to": "none", "save_strategy": "no", "use_cpu": True}
    quiet |= {"logging_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    return {"output_dir": str(folder), "max_steps": steps, **quiet, **how}


def losses(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


def made(folder: Path, steps: int, *callbacks: Any, **how: Any) -> Any:
    options = transformers.TrainingArguments(**arguments(folder, steps, **how))
    return transformers.Trainer(model(), options, train_dataset=rows(), callbacks=[*callbacks])


def trained(folder: Path, steps: int, *callbacks: Any, resume: Any = None, **how: Any) -> Any:
    trainer = made(folder, steps, *callbacks, **how)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(("bf16", "accumulated"), [(False, 1), (True, 2)])
def test_trainer(tmp_path, bf16, accumulated):
    how = {"max_grad_norm": 0.5, "gradient_accumulation_steps": accumulated, "bf16": bf16}
    train = lambda steps: losses(trained(tmp_path, steps, **how))  # noqa: E731
    check_reached(train, rtol=1e-3 if bf16 else 1e-5)


def test_trl(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({str(i): i for i in range(64)}, unk_token="0")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="0", eos_token="1", unk_token="0"
    )
    data = datasets.Dataset.from_list(rows())

    def train(steps: int) -> list[float]:
        options = trl.SFTConfig(**arguments(tmp_path, steps, max_grad_norm=0.5, bf16=False))
        trainer = trl.SFTTrainer(model(), options, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        return losses(trainer)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_reached(train)


def test_the_callback_clips_as_the_trainer_does(tmp_path):
    clip = GradClip(0.5)
    ours = trained(tmp_path, 20, clip, max_grad_norm=0.0)
    theirs = trained(tmp_path, 20, max_grad_norm=0.5)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
    stats = clip.clippers[0].stats()
    assert stats["steps"] == 20
    assert stats["clipped"] > 0
    assert losses(ours, "grad_norm") == pytest.approx(stats["total_norm"])


def groups(net: torch.nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": net.model, "max_norm": fastclip.AutoClip(50), "name": "body"},
        {"params": net.lm_head, "max_norm": 0.1, "name": "head"},
    ]


SAVED = {"max_grad_norm": 0.0, "save_strategy": "steps", "save_steps": 10}


def test_the_callback_takes_groups_and_goes_on_from_a_checkpoint(tmp_path):
    whole = GradClip(groups=groups)
    first = trained(tmp_path, 20, whole, **SAVED)
    stats = whole.clippers[0].stats()
    for name in ("body", "head"):
        assert losses(first, f"grad_norm/{name}") == pytest.approx(stats[name]["total_norm"])
    # Wherever it lies, and whatever else lies where this run will write.
    elsewhere, foreign = tmp_path / "copied", tmp_path / "other"
    shutil.copytree(tmp_path / "checkpoint-10", elsewhere)
    shutil.copytree(tmp_path / "checkpoint-20", foreign / "checkpoint-10")
    for folder, checkpoint in ((tmp_path, tmp_path / "checkpoint-10"), (foreign, elsewhere)):
        rest = GradClip(groups=groups)
        last = trained(folder, 20, rest, resume=str(checkpoint), **SAVED)
        assert losses(last)[-10:] == pytest.approx(losses(first)[-10:], rel=1e-5)
        assert rest.clippers[0].stats() == stats


def test_runs_that_do_not_resume_it_begin_anew_and_a_rule_is_the_users(tmp_path):
    rule = fastclip.AutoClip(50)
    clip, runs = GradClip(rule), []
    for _ in range(2):
        runs.append(losses(trained(tmp_path, 10, clip, max_grad_norm=0.0)))
        assert clip.clippers[0].stats()["steps"] == int(rule.state_dict()["count"]) == 10
    assert runs[0] == runs[1]
    trained(tmp_path, 10, **SAVED)
    with pytest.warns(UserWarning, match="this checkpoint was saved without it"):
        trained(tmp_path, 20, clip, resume=str(tmp_path / "checkpoint-10"), **SAVED)
    assert clip.clippers[0].stats()["steps"] == 10


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "fp16"])
def test_what_it_cannot_clip_it_refuses(kind, tmp_path, monkeypatch):
    """Such runs need a GPU: the Trainer's settings are those of a CPU run."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    trainer = made(tmp_path, 2, GradClip(1), max_grad_norm=0.0)
    if kind == "fp16":
        monkeypatch.delattr(transformers.Trainer, "_get_grad_norm")
        trainer.args.fp16 = True
    else:
        monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType[kind])
    with pytest.raises(ValueError, match=f"GradClip: {kind} "):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_bad_arguments_are_named(tmp_path):
    for wrong in ({}, {"max_norm": 1.0, "groups": groups}):
        with pytest.raises(TypeError, match="max_norm, groups: expected one of the two"):
            GradClip(**wrong)
    with pytest.raises(ValueError, match=r"max_grad_norm 1.0 .* pass max_grad_norm=0"):
        trained(tmp_path, 2, GradClip(0.5))
    with pytest.raises(ValueError, match="the Trainer has two of these callbacks"):
        trained(tmp_path, 2, GradClip(0.5), GradClip(0.5), max_grad_norm=0.0)
