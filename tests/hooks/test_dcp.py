"""One rank behind ``torch.distributed.checkpoint``: what ``save`` was given is what ``load`` gives back; what is refused."""

from __future__ import annotations

import os
import pickle
import random
import signal
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import holdfast
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from holdfast import Tier
from holdfast.errors import ConfigError, StateRefused, StateUnreachable
from holdfast.hooks.dcp.numbers import step_of
from holdfast.hooks.dcp.plans import Delta, grid_of
from holdfast.ops import cli
from holdfast.snapshot.layout import ITEM_BYTES
from holdfast.tests.hooks.nodes import QUICK, Node, bits, until
from holdfast.tests.hooks.test_checkpointer import Loop, trained
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

# Each call of DCP in a process without torch.distributed says that this is so.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def writer(node: Node, **options: Any) -> holdfast.dcp.Writer:
    return holdfast.dcp.Writer(**{"job": node.job, "shm": str(node.shm), "deadlines": QUICK, **options})


def reader(node: Node, **options: Any) -> holdfast.dcp.Reader:
    return holdfast.dcp.Reader(**{"job": node.job, "shm": str(node.shm), "deadlines": QUICK, **options})


@pytest.fixture
def write(shared: Node) -> Iterator[holdfast.dcp.Writer]:
    """A Writer that is closed after the test."""
    with writer(shared) as opened:
        yield opened


def _state() -> dict[str, Any]:
    """Nested, and of every kind that DCP is likely to meet."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randint(0, 256, (24, 16), dtype=torch.uint8, generator=generator)
    dtypes = {name: noise.view(getattr(torch, name)) for name in ITEM_BYTES if name not in ("bool", "complex32")}
    return {
        "model": {"weight": torch.randn(300, 500, generator=generator), "bias": torch.arange(5), **dtypes},
        "odd": {
            "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 3), "columns": torch.arange(24).view(4, 6)[:, 1:4],
            "turned": torch.arange(24.0).view(4, 6).t(),
            "bool": torch.tensor([True, False]),
        },
        "layers": [{"w": torch.ones(2)}, {"w": torch.full((2,), 2.0)}, torch.zeros(3)],
        "lr": 0.1, "name": "a name", "none": None, "seen": [1, 2, 3], "flags": (True, {"x"}), "raw": b"\0\1",
        "order": (OrderedDict(a=1),), "array": np.arange(6).reshape(2, 3), "rng": random.Random(3).getstate(),
        "mixed": (torch.arange(3), "with a tensor"),
    }  # fmt: skip


def _blank(value: Any) -> Any:
    """Of the same shape, with nothing in it."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, list):
        return [_blank(entry) for entry in value]
    return {key: _blank(entry) for key, entry in value.items()} if isinstance(value, dict) else None


def _loaded(like: dict[str, Any], read: holdfast.dcp.Reader, name: str | None = None) -> dict[str, Any]:
    into: dict[str, Any] = _blank(like)
    dcp.load(into, checkpoint_id=name, storage_reader=read)
    return into


# -- there and back ------------------------------------------------------------------------------------------------------


def test_what_was_saved_comes_back(shared: Node, write: holdfast.dcp.Writer) -> None:
    state = _state()
    wanted = bits(state)
    dcp.save(state, storage_writer=write)
    state["model"]["weight"].zero_()  # the caller's own again
    state["lr"] = 2.0
    loaded = _loaded(state, holdfast.dcp.Reader(write))
    assert bits(loaded) == wanted
    write.close(ended=False)
    assert bits(_loaded(state, reader(shared))) == wanted
    assert type(loaded["order"][0]) is OrderedDict
    assert type(loaded["flags"][1]) is set


def test_training_goes_on_where_it_was(shared: Node, write: holdfast.dcp.Writer) -> None:
    loop = Loop.make()
    loop.turn()
    model, optimizer = get_state_dict(loop.model, loop.optimizer)
    dcp.save({"model": model, "optim": optimizer, "rng": torch.get_rng_state()}, storage_writer=write)
    loop.turn()
    again = Loop.make(seed=2)
    model, optimizer = get_state_dict(again.model, again.optimizer)
    into = {"model": model, "optim": optimizer, "rng": torch.get_rng_state()}
    dcp.load(into, storage_reader=holdfast.dcp.Reader(write))
    set_state_dict(again.model, again.optimizer, model_state_dict=into["model"], optim_state_dict=into["optim"])  # type: ignore[arg-type]
    torch.set_rng_state(into["rng"])  # type: ignore[arg-type]
    again.turn()
    assert again.bits() == loop.bits()


def test_the_lines_in_the_readme(shared: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lives of them are as good as one."""
    text = (Path(holdfast.__file__).parent / "README.md").read_text().partition("## Behind `torch.distributed")[2]
    lines = compile(text.partition("```python")[2].partition("```")[0], "README.md", "exec")
    monkeypatch.setenv("HOLDFAST_JOB", shared.job)
    monkeypatch.setenv("HOLDFAST_SHM", str(shared.shm))
    truth = _live(lines, steps=4)
    shared.wipe()
    _live(lines, steps=2)
    assert _live(lines, steps=4) == truth


def _live(lines: CodeType, steps: int) -> Any:
    loop = Loop.make()

    def train_one_step() -> None:
        torch.manual_seed(len(loop.optimizer.state) and int(next(iter(loop.optimizer.state.values()))["step"]))
        loop.turn()

    exec(lines, {"model": loop.model, "optimizer": loop.optimizer, "steps": steps, "train_one_step": train_one_step})
    return loop.bits()[:2]


def test_stateful_objects(write: holdfast.dcp.Writer) -> None:
    before, after = Loop.make(), Loop.make(seed=2)
    dcp.save({"model": before.model}, storage_writer=write)
    dcp.load({"model": after.model}, storage_reader=holdfast.dcp.Reader(write))
    assert bits(after.model.state_dict()) == bits(before.model.state_dict())


def test_async_save(write: holdfast.dcp.Writer) -> None:
    state = _state()
    wanted = bits(state)
    saved = dcp.async_save(state, checkpoint_id="step-5", storage_writer=write)
    state["model"]["weight"].zero_()
    saved.result()  # type: ignore[union-attr]
    assert write.step == 5
    assert bits(_loaded(state, holdfast.dcp.Reader(write))) == wanted


def test_other_dtypes_are_converted(write: holdfast.dcp.Writer) -> None:
    dcp.save({"w": torch.arange(6.0).view(2, 3)}, storage_writer=write)
    into = {"w": torch.zeros(2, 3, dtype=torch.float16)}
    dcp.load(into, storage_reader=holdfast.dcp.Reader(write))
    assert into["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_lazily_conjugated_tensors(write: holdfast.dcp.Writer) -> None:
    conjugated = torch.complex(torch.ones(3), torch.arange(3.0)).conj()
    dcp.save({"c": conjugated, "imag": conjugated.imag}, storage_writer=write)
    into = {"c": torch.zeros(3, dtype=torch.complex64), "imag": torch.zeros(3)}
    dcp.load(into, storage_reader=holdfast.dcp.Reader(write))
    assert into["c"].tolist() == conjugated.tolist()
    assert into["imag"].tolist() == [-0.0, -1.0, -2.0]


def test_a_planner_that_caches_its_plans(write: holdfast.dcp.Writer) -> None:
    class Caching(dcp.DefaultSavePlanner):
        """What planners cache is told apart by the names of their classes."""

    for number in range(4):
        state = {"w": torch.full((2,), float(number)), "number": number, **({"more": "x"} if number == 3 else {})}
        dcp.save(state, storage_writer=write, planner=Caching(enable_plan_caching=True))
        assert _loaded(state, holdfast.dcp.Reader(write))["number"] == number
    with pytest.raises(ConfigError, match="has never seen"):
        Delta([]).whole([SavePlan([], usable=False)])


def test_a_state_that_grows_and_shrinks(write: holdfast.dcp.Writer) -> None:
    for step, size in enumerate((10, 400_000, 1_000_000, 3), start=1):
        state = {"w": torch.randn(size), **{f"more{i}": torch.full((2,), float(i)) for i in range(step)}}
        dcp.save(state, storage_writer=write)
        assert bits(_loaded(state, holdfast.dcp.Reader(write))) == bits(state)


# -- what fails meanwhile ------------------------------------------------------------------------------------------------


def test_an_agent_that_dies_is_waited_for(node: Node) -> None:
    with writer(node) as write:
        dcp.save({"w": torch.tensor(1)}, storage_writer=write)
        pid = node.pid()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        dcp.save({"w": torch.tensor(2)}, storage_writer=write)
        assert node.pid() != pid
        assert int(_loaded({"w": torch.tensor(0)}, holdfast.dcp.Reader(write))["w"]) == 2


def test_a_slot_that_is_spilled_is_waited_for(node: Node, tmp_path: Path) -> None:
    """A training loop would skip these snapshots."""
    with writer(node, tiers=[Tier(str(tmp_path), every=1)]) as write:
        for number in range(1, 5):
            dcp.save({"w": torch.full((300_000,), float(number))}, storage_writer=write)
            assert write.step == number
        assert not write.stats().skipped.keys() & {"unprotected", "not-spilled"}
        until(lambda: node.status().tiers[0].spills > 0, "a spill")


def test_a_damaged_copy_is_read_from_elsewhere(node: Node, tmp_path: Path) -> None:
    state = {"w": torch.randn(1000), "lr": 0.1}
    with writer(node, tiers=[Tier(str(tmp_path), every=1000)], wait="persisted") as write:
        dcp.save(state, storage_writer=write)
        for slot in node.slots():
            if slot.sealed_record() is not None:
                slot.image[100] ^= 1
            slot.close()
        assert bits(_loaded(state, holdfast.dcp.Reader(write))) == bits(state)


def test_a_load_that_fails_leaves_nothing_behind(shared: Node, write: holdfast.dcp.Writer) -> None:
    dcp.save({"w": torch.ones(2)}, storage_writer=write)
    with pytest.raises(CheckpointException, match="Missing key"):
        dcp.load({"other": torch.ones(2)}, storage_reader=holdfast.dcp.Reader(write))
    dcp.save({"w": torch.ones(2)}, storage_writer=write)
    write.close(ended=False)
    with pytest.raises(CheckpointException, match="Missing key"):
        dcp.load({"other": torch.ones(2)}, storage_reader=reader(shared))
    with writer(shared) as again:  # the Reader has let go of the rank
        dcp.save({"w": torch.ones(2)}, storage_writer=again)


# -- which step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "step"),
    [("1200", 1200), (1200, 1200), ("step-1200", 1200), (Path("/ckpts/run7/step_001200"), 1200),
     ("s3://b/run7/1200.dcp", 1200), ("epoch3-step40/", 40)],
)  # fmt: skip
def test_the_step_that_a_name_means(name: Any, step: int) -> None:
    assert step_of(name) == step
    assert holdfast.dcp.Writer.validate_checkpoint_id(name)


@pytest.mark.parametrize("name", ["last", "run7/last", "", "9" * 20])
def test_names_that_mean_no_step(name: str) -> None:
    with pytest.raises(ConfigError):
        step_of(name)
    assert not holdfast.dcp.Reader.validate_checkpoint_id(name)


def test_steps(shared: Node, write: holdfast.dcp.Writer) -> None:
    dcp.save({"w": torch.tensor(1)}, storage_writer=write)
    dcp.save({"w": torch.tensor(30)}, checkpoint_id="step-30", storage_writer=write)
    dcp.save({"w": torch.tensor(31)}, storage_writer=write)
    assert write.step == 31
    read = holdfast.dcp.Reader(write)
    into = {"w": torch.tensor(0)}
    for name, wanted in ((None, 31), ("step-30", 30), (None, 31)):
        dcp.load(into, checkpoint_id=name, storage_reader=read)
        assert int(into["w"]) == wanted
    with pytest.raises(CheckpointException, match="but no image of it is left"):  # two slots, with newer ones in them
        dcp.load(into, checkpoint_id="step-1", storage_reader=read)
    # Who has loaded may be going back.
    dcp.load(into, checkpoint_id="step-30", storage_reader=read)
    dcp.save({"w": torch.tensor(7)}, checkpoint_id="step-31", storage_writer=write)
    with pytest.raises(CheckpointException, match="step 31 comes after step 31"):
        dcp.save({"w": torch.tensor(8)}, checkpoint_id="step-31", storage_writer=write)
    write.close(ended=False)
    with writer(shared) as again:
        assert again.step == 31
        dcp.load(into, storage_reader=holdfast.dcp.Reader(again))
    assert int(into["w"]) == 7


def test_nothing_to_load(write: holdfast.dcp.Writer) -> None:
    with pytest.raises(CheckpointException, match="this job has no snapshot that can be loaded"):
        dcp.load({"w": torch.zeros(1)}, storage_reader=holdfast.dcp.Reader(write))


# -- what is refused -----------------------------------------------------------------------------------------------------


def _refused(write: holdfast.dcp.Writer, state: dict[str, Any], name: str | None = None) -> BaseException:
    with pytest.raises(CheckpointException) as caught:
        dcp.save(state, checkpoint_id=name, storage_writer=write)
    ((error, _),) = caught.value.failures.values()
    return error


def test_what_cannot_be_stored_is_refused_by_its_path(write: holdfast.dcp.Writer) -> None:
    dcp.save({"w": torch.ones(2)}, storage_writer=write)
    error = _refused(write, {"w": torch.zeros(2), "loader": {"shard": [1, {"order": (1, print)}]}})
    assert isinstance(error, StateRefused)
    assert "values['loader.shard.1.order'][1]: <built-in function print>" in str(error)
    assert "without pickle" in str(error)
    error = _refused(write, {"model": {"w": torch.zeros(2, 2).to_sparse()}})
    assert isinstance(error, StateRefused)
    assert "model.w" in str(error)
    into = {"w": torch.zeros(2)}
    dcp.load(into, storage_reader=holdfast.dcp.Reader(write))  # the one before is whole
    assert into["w"].tolist() == [1, 1]
    dcp.save({"w": torch.full((2,), 3.0)}, storage_writer=write)  # and the next one is taken
    dcp.load(into, storage_reader=holdfast.dcp.Reader(write))
    assert into["w"].tolist() == [3, 3]


def test_a_planner_that_only_pickles(write: holdfast.dcp.Writer) -> None:
    class Blind(dcp.DefaultSavePlanner):
        lookup_object = None  # type: ignore[assignment]

    with pytest.raises(CheckpointException, match="a planner with lookup_object is needed"):
        dcp.save({"lr": 0.1}, storage_writer=write, planner=Blind())


def test_another_process_cannot_write(write: holdfast.dcp.Writer) -> None:
    with pytest.raises(ConfigError, match=r"AsyncCheckpointerType\.THREAD"):
        pickle.dumps(write)


def test_what_cannot_be_waited_for(shared: Node) -> None:
    for wait, why in (("persisted", "no tier"), ("protected", "no peers")):
        with pytest.raises(StateUnreachable, match=why):
            writer(shared, wait=wait)
    with writer(shared) as write:  # nothing is left attached
        assert write.step == 0


def test_one_at_a_time(write: holdfast.dcp.Writer) -> None:
    with write.saves.at_work("a test"):
        error = _refused(write, {"w": torch.ones(1)})
    assert "another save or load is under way" in str(error)
    dcp.save({"w": torch.ones(1)}, storage_writer=write)
    write.close()
    assert "the Writer is closed" in str(_refused(write, {"w": torch.ones(1)}))


# -- an ordinary snapshot ------------------------------------------------------------------------------------------------


def test_the_command_line_knows_it(shared: Node, write: holdfast.dcp.Writer, tmp_path: Path, capsys: Any) -> None:
    state = {"model": {"w": torch.arange(6.0).view(2, 3)}, "lr": 0.5}
    dcp.save(state, checkpoint_id="step-12", storage_writer=write)

    def call(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        printed = capsys.readouterr()
        assert ended.value.code == 0, printed.err
        return str(printed.out)

    where = str(shared.settings.socket)
    assert "12" in call("ls", where)
    assert "model.w" in call("inspect", f"{where}#latest")
    call("verify", where)
    for form in ("torch", "dcp", "safetensors", "zarr"):
        call("restore", f"{where}#latest", "--to", str(tmp_path / form), "--format", form)
    assert torch.load(tmp_path / "torch/tensors.pt")["model.w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert torch.load(tmp_path / "torch/values.pt")["ranks"][0]["values"]["values"] == {"lr": 0.5}
    into = {"model": {"w": torch.zeros(2, 3)}}
    dcp.load(into, checkpoint_id=tmp_path / "dcp")
    assert bits(into["model"]) == bits(state["model"])


def test_what_a_checkpointer_took(shared: Node) -> None:
    loop, again = Loop.make(), Loop.make(seed=2)
    with shared.attach(loop.model, loop.optimizer) as ckpt:
        ckpt.restore()
        trained(ckpt, loop, range(1, 3))
        ckpt.close(ended=False)
    dcp.load({"model": again.model}, storage_reader=reader(shared))
    assert bits(again.model.state_dict()) == bits(loop.model.state_dict())


# -- grids ---------------------------------------------------------------------------------------------------------------


def test_grids() -> None:
    rows = [((r, 0), (min(3, 10 - r), 4)) for r in range(0, 10, 3)]
    assert grid_of((10, 4), rows) == (3, 4)
    assert grid_of((10, 4), [*rows, ((10, 0), (0, 4))]) == (3, 4)  # an empty shard is nowhere
    assert grid_of((10, 4), [((0, 0), (10, 4))]) == (10, 4)
    assert grid_of((4, 6), [((r, c), (2, 2)) for r in (0, 2) for c in (0, 2, 4)]) == (2, 2)
    assert grid_of((), [((), ())]) == ()
    assert grid_of((0, 3), [((0, 0), (0, 3))]) == (1, 3)
    assert grid_of((4, 6), [((0, 0), (4, 4)), ((0, 4), (4, 2))]) == (4, 4)
    assert grid_of((4, 7), [((0, 0), (4, 2)), ((0, 2), (4, 5))]) is None
