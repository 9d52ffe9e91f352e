import builtins
import json
import os
import shutil
import threading
from pathlib import Path

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from tests.families import FAMILIES
from tests.runs import DEMO_DEFAULTS, in_process, lines
from vit_hf.data.preprocessing import Preprocessing
from vit_hf.errors import UserError
from vit_hf.models.presets import from_preset
from vit_hf.training import files, manifest
from vit_hf.training.checkpoint import Checkpoints, load
from vit_hf.training.ema import EMA
from vit_hf.training.files import write_tensors
from vit_hf.training.manifest import BrokenCheckpoint, find, move_aside, read_manifest
from vit_hf.training.model_folder import ModelFolder, files_of
from vit_hf.training.partition import Whole
from vit_hf.training.state import TrainState

RECORD = {"run": {}, "exactness": {}, "wall_time_seconds": 1.0}


def make_state(optim="adamw", ema=True):
    accelerator = accelerate.Accelerator(cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    if optim == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    engine, optimizer = accelerator.prepare(model, optimizer)
    partition = Whole(accelerator, model, optimizer)
    return TrainState(accelerator, model, engine, optimizer, partition, EMA(partition, model, 0.9) if ema else None)


def folder_of(state):
    tensors = state.model.state_dict()
    return ModelFolder({name: name for name in tensors}, {name: tuple(t.shape) for name, t in tensors.items()}, {})


def checkpoints_of(state, tmp_path, **settings):
    return Checkpoints(state, folder_of(state), tmp_path, **settings)


def save(checkpoints, step):
    checkpoints.save(step, RECORD)
    assert checkpoints.wait() is None


def put_back(state, folder):
    load(state, folder_of(state), folder, read_manifest(folder))


def step(state):
    state.model(torch.randn(5, 3, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    if state.ema is not None:
        state.ema.update()


def everything(state):
    """Weights and statistics, their average, and what the optimizer holds, copied."""
    found = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    for key in state.partition.moment_keys():
        found |= {
            f"{key}.{name}": state.partition.full_moment(name, key).clone()
            for name in dict(state.model.named_parameters())
        }
    found["steps"] = torch.tensor(state.partition.optimizer_steps())
    if state.ema is not None:
        with state.ema.in_place():
            found |= {f"average.{name}": tensor.clone() for name, tensor in state.model.state_dict().items()}
    return found


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def state():
    return make_state()


class Killed(BaseException):
    """Not an Exception: nothing in the code may catch it, as nothing catches a kill."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_kill_at_any_point_of_a_save_leaves_the_previous_checkpoint(state, tmp_path, monkeypatch):
    """Every call that touches the disk, in the thread or out of it, is once the last one."""
    step(state)
    save(checkpoints_of(state, tmp_path), 1)
    expected = everything(state)
    step(state)
    calls = die_at = 0

    def guard(function):
        def guarded(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls >= die_at:  # whatever would clean up is dead too
                raise Killed
            return function(*args, **kwargs)

        return guarded

    for last in range(1, 100):
        calls, die_at = 0, last
        checkpoints = checkpoints_of(state, tmp_path, total_limit=1)
        with monkeypatch.context() as patch:
            for owner, name in ((Path, "mkdir"), (Path, "rename"), (Path, "unlink"), (os, "fsync"), (shutil, "rmtree"),
                                (builtins, "open")):  # fmt: skip
                patch.setattr(owner, name, guard(getattr(owner, name)))
            checkpoints.save(2, RECORD)
            why = checkpoints.wait()
        if why is None:
            break
        assert "has died" in why
        folder, found, _ = find(tmp_path, "auto")
        if found["step"] == 2:  # renamed: whole, whatever of the pruning was left undone
            shutil.rmtree(folder)
        else:
            put_back(state, folder)
            assert found["step"] == 1 and same(everything(state), expected)
            step(state)
    assert last > 8  # the kills did come in between
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
@pytest.mark.parametrize("ema", [True, False])
def test_load_brings_back_everything_to_the_bit(tmp_path, optim, ema):
    state = make_state(optim, ema)
    step(state)
    save(checkpoints_of(state, tmp_path), 1)
    saved = everything(state)
    step(state)
    expected = everything(state)
    other = make_state(optim, ema)  # a new start, which has made no step
    put_back(other, tmp_path / "checkpoint-1")
    assert same(everything(other), saved)
    step(other)
    assert same(everything(other), expected)
    step(state)
    put_back(state, tmp_path / "checkpoint-1")  # and a running one goes back
    assert same(everything(state), saved)


def test_the_weights_in_the_models_file_are_the_average(state, tmp_path):
    step(state)
    step(state)
    save(checkpoints_of(state, tmp_path), 2)
    exported = load_file(tmp_path / "checkpoint-2/model.safetensors")
    found = everything(state)
    assert all(torch.equal(exported[name], found[f"average.{name}"]) for name in exported)
    assert not torch.equal(exported["0.weight"], found["0.weight"])
    assert not torch.equal(exported["1.running_mean"], found["1.running_mean"])


@pytest.mark.parametrize("then", [True, False])
def test_an_average_may_be_dropped_or_begun(tmp_path, then):
    """With --change ema_decay: the weights go on as they were; a new average starts from them."""
    state = make_state(ema=then)
    step(state)
    step(state)
    save(checkpoints_of(state, tmp_path), 2)
    other = make_state(ema=not then)
    put_back(other, tmp_path / "checkpoint-2")
    one, two = everything(state), everything(other)
    assert all(torch.equal(one[name], two[name]) for name in one.keys() & two.keys())
    if not then:
        assert all(torch.equal(two[name], two[f"average.{name}"]) for name in state.model.state_dict())


def test_what_is_saved_is_what_was_there_when_training_went_on(state, tmp_path, monkeypatch):
    """save() returns while the disk still works; a second one waits for the first."""
    checkpoints, release, real = checkpoints_of(state, tmp_path), threading.Event(), os.fsync
    step(state)
    expected = everything(state)

    def slow(descriptor):
        assert release.wait(60)
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", slow)
    checkpoints.save(1, RECORD)
    step(state)  # in place, in the very storages that were saved
    assert not (tmp_path / "checkpoint-1").exists() and not checkpoints.failed
    threading.Timer(0.2, release.set).start()
    assert checkpoints.save(2, RECORD) > 0
    assert (tmp_path / "checkpoint-1").exists()
    assert checkpoints.wait() is None and (tmp_path / "checkpoint-2").exists()
    put_back(state, tmp_path / "checkpoint-1")
    assert same(everything(state), expected)


@pytest.mark.parametrize("where", ["write", "fsync", "rename", "mkdir"])
def test_a_write_that_fails_in_the_thread_leaves_the_earlier_ones_and_training_goes_on(
    state, tmp_path, monkeypatch, capsys, where
):
    checkpoints = checkpoints_of(state, tmp_path, total_limit=1)
    save(checkpoints, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "the disk")

    with monkeypatch.context() as patch:
        if where == "write":  # when some of a file is there
            real = files._chunks
            patch.setattr(
                files, "_chunks", lambda parts: (full() if n else chunk for n, chunk in enumerate(real(parts)))
            )
        else:
            patch.setattr(os if where == "fsync" else Path, where, full)
        checkpoints.save(2, RECORD)
        assert checkpoints.wait() == "No space left on device: the disk"
    assert checkpoints.failed
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert event["event"] == "save_failed" and event["step"] == 2 and "No space left" in event["why"]
    errors = capsys.readouterr().err
    assert "warning: checkpoint-2 could not be written: No space left" in errors and "Traceback" not in errors
    save(checkpoints, 2)  # the disk has room again
    assert not checkpoints.failed
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_on_save_error_stop_ends_the_run_at_the_next_save(state, tmp_path, monkeypatch):
    checkpoints = checkpoints_of(state, tmp_path, on_save_error="stop")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        checkpoints.save(1, RECORD)
        checkpoints.close()
    with pytest.raises(UserError, match="checkpoint-1 could not be written: No space left.*--on_save_error warn"):
        checkpoints.save(2, RECORD)


@pytest.mark.parametrize("what", ["weight", "moment", "statistics", "average"])
def test_what_is_not_finite_is_never_a_checkpoint(state, tmp_path, what):
    checkpoints = checkpoints_of(state, tmp_path)
    step(state)
    save(checkpoints, 1)
    with torch.no_grad():
        if what == "weight":
            state.model[2].weight[0, 0] = float("nan")
        elif what == "moment":
            state.partition.full_moment("2.weight", "exp_avg_sq")[0, 0] = float("inf")
        elif what == "statistics":
            state.model[1].running_var[0] = float("inf")
        else:
            weight = state.model[2].weight.clone()
            state.model[2].weight.fill_(float("nan"))
            state.ema.update()
            state.model[2].weight.copy_(weight)
    checkpoints.save(2, RECORD)
    assert "is not finite" in checkpoints.wait()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_only_the_newest_are_kept(state, tmp_path):
    checkpoints = checkpoints_of(state, tmp_path, total_limit=2)
    for number in (5, 10, 100, 20):
        save(checkpoints, number)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-20"]


def test_folders_of_others_are_not_pruned_or_overwritten(state, tmp_path):
    for name in ("checkpoint-500", "checkpoint-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    checkpoints = checkpoints_of(state, tmp_path, total_limit=1)
    for number in (1, 2):
        save(checkpoints, number)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-2.aside", "checkpoint-500"]
    assert move_aside(tmp_path / "checkpoint-500").name == "checkpoint-500.aside"
    assert (tmp_path / "checkpoint-500.aside/trainer_state.json").exists()
    assert (tmp_path / "checkpoint-2.aside/trainer_state.json").exists()


def test_a_step_is_saved_once(state, tmp_path):
    checkpoints = checkpoints_of(state, tmp_path)
    save(checkpoints, 3)
    before = (tmp_path / "checkpoint-3/manifest.json").stat().st_ino
    save(checkpoints, 3)
    assert (tmp_path / "checkpoint-3/manifest.json").stat().st_ino == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize("damage", ["truncate", "change", "remove", "manifest"])
def test_damage_is_seen_and_named(state, tmp_path, damage):
    save(checkpoints_of(state, tmp_path), 3)
    path = tmp_path / "checkpoint-3/training_state-00001-of-00001.safetensors"
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[:-1])
    elif damage == "change":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "remove":
        path.unlink()
    else:
        path = tmp_path / "checkpoint-3/manifest.json"
        path.write_text("{")
    with pytest.raises(BrokenCheckpoint, match=path.name):
        read_manifest(tmp_path / "checkpoint-3")
    assert find(tmp_path, "auto")[0] is None
    with pytest.raises(UserError, match="--resume_from_checkpoint: .*checkpoint-3 cannot be used"):
        find(tmp_path, str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize(
    "files_then", [["optimizer.pt", "model.safetensors"], ["deepspeed/mp_rank_00_model_states.pt"]]
)
def test_a_checkpoint_of_the_older_format_says_which_version_goes_on(state, tmp_path, files_then):
    """Under `auto` too: starting anew beside it without a word would lose it."""
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    content = {"step": 7, "run": {}, "versions": {"vit_hf": "0.2.0"}, "files": dict.fromkeys(files_then, {})}
    (folder / "manifest.json").write_text(json.dumps(content))
    for resume_from in ("auto", str(folder)):
        with pytest.raises(
            UserError,
            match="checkpoint-7 cannot be used: vit_hf 0.2.0 wrote it in an older format, and that version goes on",
        ):
            find(tmp_path, resume_from)
    (folder / "manifest.json").write_text(json.dumps({**content, "format": 3, "versions": {"vit_hf": "9.9"}}))
    with pytest.raises(UserError, match=r"a newer vit_hf \(9.9\) wrote it in format 3; update"):
        find(tmp_path, "auto")


def rewrite(folder, shards):
    """Puts other training state into a checkpoint, with a manifest that fits it."""
    content = json.loads((folder / "manifest.json").read_text())
    for name in [name for name in content["files"] if name.startswith("training_state")]:
        (folder / name).unlink()
        del content["files"][name]
    for number, tensors in enumerate(shards):
        name = manifest.shard_name(number, len(shards))
        save_file(tensors, folder / name)
        content["files"][name] = files.describe(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest.seal(content)))


def test_any_number_of_processes_may_have_written_it(state, tmp_path):
    step(state)
    save(checkpoints_of(state, tmp_path), 1)
    expected, folder = everything(state), tmp_path / "checkpoint-1"
    tensors = load_file(folder / manifest.shard_name(0, 1))
    names = sorted(tensors)
    rewrite(folder, [{name: tensors[name] for name in names[start::3]} for start in range(3)])
    step(state)
    put_back(state, folder)
    assert same(everything(state), expected)
    (folder / manifest.shard_name(1, 3)).unlink()
    with pytest.raises(BrokenCheckpoint, match="training_state-00002-of-00003.safetensors is missing"):
        read_manifest(folder)


def test_another_optimizer_or_model_is_refused_by_the_tensors_names(state, tmp_path):
    save(checkpoints_of(state, tmp_path), 1)
    folder = tmp_path / "checkpoint-1"
    with pytest.raises(UserError, match="momentum_buffer.0.weight is missing; .*and .* more") as caught:
        put_back(make_state("sgd"), folder)
    assert "another model, optimizer or --freeze" in str(caught.value)
    tensors = load_file(folder / manifest.shard_name(0, 1))
    rewrite(folder, [{**tensors, "exp_avg.9.weight": torch.zeros(1)}])
    with pytest.raises(UserError, match="exp_avg.9.weight is left over"):
        put_back(state, folder)
    rewrite(folder, [{**tensors, "exp_avg.0.weight": torch.zeros(1)}])  # torch would spread it without a word
    with pytest.raises(UserError, match=r"exp_avg.0.weight has shape \(1,\) instead of \(4, 3\)"):
        put_back(state, folder)


def test_nothing_is_unpickled(state, tmp_path):
    """A file that would run code when unpickled is refused, even where its checksum is right."""

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "broken_into"),))

    save(checkpoints_of(state, tmp_path), 1)
    folder = tmp_path / "checkpoint-1"
    name = manifest.shard_name(0, 1)
    torch.save(Evil(), folder / name)
    content = json.loads((folder / "manifest.json").read_text())
    content["files"][name] = files.describe(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest.seal(content)))
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        put_back(state, folder)
    assert not (tmp_path / "broken_into").exists()


def test_tensors_are_written_as_the_library_writes_them(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "w": torch.randn(7, 5), "half": torch.randn(3).half(), "b": torch.randn(5).bfloat16(), "none": torch.zeros(0, 4),
        "count": torch.tensor(7), "flag": torch.tensor([True, False, True]), "byte": torch.arange(5, dtype=torch.uint8),
        "transposed": torch.randn(4, 6).T, "double": torch.randn(2, dtype=torch.float64), "large": torch.randn(1 << 23),
    }  # fmt: skip
    written = write_tensors(tmp_path / "ours", {name: tensor.contiguous() for name, tensor in tensors.items()})
    assert written == files.describe(tmp_path / "ours")
    read = load_file(tmp_path / "ours")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_checkpoint_is_the_folder_that_its_save_pretrained_writes(family, tmp_path):
    """The same files with the same tensors under the same names; and the same weights come back."""
    preset, changes = FAMILIES[family]
    processor = Preprocessing(image_size=(32, 32)).image_processor()

    def build(seed):
        torch.manual_seed(seed)
        model = from_preset(preset, ["a", "b", "c"], changes)
        with torch.no_grad():
            for tensor in filter(torch.is_floating_point, model.state_dict().values()):
                tensor.add_(torch.rand_like(tensor) * 0.1)
        accelerator = accelerate.Accelerator(cpu=True)
        form = files_of(accelerator, model, processor)
        engine, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        partition = Whole(accelerator, model, optimizer)
        return TrainState(accelerator, model, engine, optimizer, partition), form

    state, form = build(0)
    save(Checkpoints(state, form, tmp_path / "run"), 1)
    state.model.save_pretrained(tmp_path / "stock")
    processor.save_pretrained(tmp_path / "stock")
    ours = {path.name for path in (tmp_path / "run/checkpoint-1").iterdir()}
    assert ours == {path.name for path in (tmp_path / "stock").iterdir()} | {
        "manifest.json",
        manifest.shard_name(0, 1),
    }
    for path in (tmp_path / "stock").iterdir():
        if path.suffix != ".safetensors":
            assert path.read_bytes() == (tmp_path / "run/checkpoint-1" / path.name).read_bytes(), path.name
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("stock", "run/checkpoint-1"))
    assert same(one, two)
    other, form = build(1)
    load(other, form, tmp_path / "run/checkpoint-1", read_manifest(tmp_path / "run/checkpoint-1"))
    assert same(state.model.state_dict(), other.model.state_dict())
    auto = AutoModelForImageClassification.from_pretrained(tmp_path / "run/checkpoint-1", trust_remote_code=True)
    pixel_values = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            auto.eval()(pixel_values=pixel_values).logits, state.model.eval()(pixel_values=pixel_values).logits
        )


def test_a_checkpoint_is_evaluated_and_fine_tuned_as_any_model_folder(run, tmp_path):
    """What is judged is the average, as during the run; the manifest's files stay as they were."""
    folder = run("pretrain", save_steps=3, eval_steps=3, ema_decay=0.9, random_flip=0.5)
    at_three = next(line for line in lines(folder, "eval_loss") if line["step"] == 3)
    from vit_hf import cli

    command = ["evaluate", folder / "checkpoint-3", "--dataset_name", "digits", "--max_eval_samples", 101]
    cli.dispatch([str(word) for word in command])
    found = json.loads((folder / "checkpoint-3/eval_results.json").read_text())
    assert found["eval_loss"] == pytest.approx(at_three["eval_loss"], rel=1e-6)
    assert read_manifest(folder / "checkpoint-3")["step"] == 3
    flags = {name: value for name, value in DEMO_DEFAULTS.items() if name not in ("preset", "config_overrides")}
    in_process("finetune", **flags, model_name_or_path=folder / "checkpoint-6", output_dir=tmp_path / "tuned")
    first = load_file(folder / "checkpoint-6/model.safetensors")
    exported = load_file(folder / "model.safetensors")
    assert same(first, exported)  # the last step's checkpoint is the export
    assert lines(tmp_path / "tuned")[-1]["step"] == 6


@pytest.mark.parametrize("name", ["../outside", "/absolute", "./config.json", "a\\..\\b", "a/../../outside"])
def test_a_manifest_names_no_file_outside_its_folder(state, tmp_path, name):
    """Even one that is there, with the right size and checksum."""
    save(checkpoints_of(state, tmp_path), 1)
    folder, outside = tmp_path / "checkpoint-1", tmp_path / "outside"
    outside.write_text("secret")
    name = str(outside) if name == "/absolute" else name
    content = json.loads((folder / "manifest.json").read_text())
    content["files"][name] = files.describe(outside)
    (folder / "manifest.json").write_text(json.dumps(manifest.seal(content)))
    with pytest.raises(BrokenCheckpoint, match="is no name of a file in the folder"):
        read_manifest(folder)
