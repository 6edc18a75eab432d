"""The controller: one piece of work at a time, a cancel that works, and states that say what happened."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from workbench.errors import Cancelled, InputError, ModelError
from workbench.measure import measure
from workbench.models import LoadedModel
from workbench.operate.sensitivity import SensitivityOptions
from workbench.progress import Job
from workbench.store import Store
from workbench.view import loop, panels, sitting
from workbench.view.controller import Controller, State
from workbench.view.demo import DemoOptions, Measuring
from workbench.view.loop import Settings

QUICK = Settings(looking=SensitivityOptions(n_prompts=1, new_tokens=4, score_windows=2, score_tokens=32))


@pytest.fixture
def model_folder(tmp_path: Path, make_model: Callable[..., LoadedModel]) -> Path:
    model = make_model()
    model.module.save_pretrained(tmp_path / "tiny")
    model.tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def controller(tmp_path: Path, model_folder: Path) -> Iterator[Controller]:
    made = Controller(model_folder, settings=QUICK, store=Store(tmp_path / "home"))
    yield made
    made.close()


def test_analysis_gives_a_solution_within_the_budget_and_pins_hold(controller: Controller) -> None:
    seen = controller.analyse().result()
    state = controller.wait()
    assert state.look is seen
    assert state.solution is not None
    assert state.budget_range is not None
    assert state.solution.achieved_bits <= state.budget == 4.5
    assert set(state.solution.unit_bits) == {unit.id for unit in state.architecture.units}  # type: ignore[union-attr]

    before = state.solution.predicted_damage
    controller.set_budget(3.5)
    assert controller.state.solution is not None
    assert controller.state.solution.achieved_bits <= 3.5
    assert controller.state.solution.predicted_damage > before

    controller.pin("blocks.1.o", 8)
    assert controller.state.solution.unit_bits["blocks.1.o"] == 8
    assert controller.state.solution.achieved_bits <= 3.5
    assert controller.state.budget_range[0] > state.budget_range[0]  # type: ignore[index]
    controller.pin("blocks.1.o", None)
    assert controller.state.pinned == {}

    for budget in state.budget_range:
        controller.set_budget(budget)
        assert controller.state.solution is not None, controller.state.error
        assert controller.state.solution.achieved_bits == pytest.approx(budget)


def test_what_is_not_possible_becomes_one_line_and_work_goes_on(controller: Controller) -> None:
    controller.analyse().result()
    controller.set_budget(1.0)
    assert controller.state.recipe is None
    assert "impossible" in controller.state.error
    assert "\n" not in controller.state.error
    with pytest.raises(InputError, match="There are no bits to run with yet"):
        controller.run()
    controller.pin("blocks.9.o", 4)
    assert "Unknown unit 'blocks.9.o'" in controller.state.error
    controller.pin("blocks.1.o", 7)
    assert "choose one of 2, 3, 4, 5, 6, 8" in controller.state.error
    controller.set_budget(4.0)
    assert controller.state.error == ""
    assert controller.state.recipe is not None


def test_a_missing_model_is_said_and_another_try_is_allowed(tmp_path: Path) -> None:
    controller = Controller(tmp_path / "nowhere", settings=QUICK, store=Store(tmp_path / "home"))
    with pytest.raises(ModelError):
        controller.analyse().result()
    assert controller.state.error
    assert controller.state.busy == ""
    with pytest.raises(ModelError):
        controller.wait()
    controller.close()


def test_one_piece_of_work_at_a_time_and_cancel_takes_effect(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller.analyse().result()
    begun = threading.Event()

    def slow(model: object, recipe: object, folder: object, settings: object, store: object, job: Job) -> Any:
        job.stage("slow", 1_000_000)
        begun.set()
        while True:
            job.advance(0.001)

    monkeypatch.setattr(loop, "try_recipe", slow)
    future = controller.run()
    assert begun.wait(10)
    with pytest.raises(InputError, match="Running is still under way"):
        controller.run()
    with pytest.raises(InputError, match="Running is still under way"):
        controller.analyse()
    controller.set_budget(4.0)  # picking goes on meanwhile
    assert controller.state.budget == 4.0
    controller.cancel()
    with pytest.raises(Cancelled):
        future.result(timeout=10)
    assert controller.state.busy == ""
    assert not controller.state.cancelling
    assert controller.state.error == ""
    assert "Cancelled during slow" in controller.state.message

    result = SimpleNamespace()
    monkeypatch.setattr(loop, "try_recipe", lambda *_: result)
    assert controller.run().result(timeout=10) is result  # and runs again
    assert controller.state.trial is result


def test_a_defect_is_not_hidden(controller: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    controller.analyse().result()

    def broken(*_: object) -> Any:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(loop, "try_recipe", broken)
    with pytest.raises(ZeroDivisionError):
        controller.run().result(timeout=10)
    assert controller.state.error == "Unexpected ZeroDivisionError: oops"


def test_listeners_see_states_in_order_until_they_stop(controller: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sitting, "PROGRESS_INTERVAL_S", 0.0)
    seen: list[State] = []
    stop = controller.subscribe(seen.append)
    controller.analyse().result()
    controller.wait()
    assert seen[0].busy == "Analysing"
    assert seen[-1].busy == ""
    assert seen[-1] is controller.state
    stages = [state.progress.stage for state in seen if state.progress is not None]
    assert any("decoding-steps" in stage for stage in stages)
    assert any("unit-scores" in stage for stage in stages)
    stop()
    count = len(seen)
    controller.set_budget(4.0)
    assert len(seen) == count


def test_a_listener_that_acts_leaves_nobody_with_an_older_state(controller: Controller) -> None:
    first: list[float] = []
    second: list[float] = []

    def clamp(state: State) -> None:
        first.append(state.budget)
        if state.budget > 6:
            controller.set_budget(6)

    controller.subscribe(clamp)
    controller.subscribe(lambda state: second.append(state.budget))
    controller.set_budget(7)
    assert first == second == [7, 6]


def test_panels_escape_what_comes_from_outside(tmp_path: Path) -> None:
    nasty = "<script>x</script>"
    state = State(model=nasty, budget=4.0, error=nasty, message=nasty)
    for html in (
        panels.heading(nasty),
        panels.status(state),
        panels.status(State(model=nasty, budget=4.0, message=nasty)),
    ):
        assert "<script" not in html
    assert "&lt;script&gt;" in panels.status(state)


@pytest.mark.parametrize(
    ("count", "said"), [(12, "12 bytes"), (52_512, "52.5 kB"), (269_030_016, "269 MB"), (2_500_000_000, "2.5 GB")]
)
def test_sizes_read_well(count: int, said: str) -> None:
    assert panels.size(count) == said


@pytest.mark.parametrize("chosen", [Settings(pairs=3, timed_tokens=5, threads=1), DemoOptions(pairs=3, timed_tokens=5)])
def test_settings_are_arguments_of_measure(chosen: Measuring) -> None:
    given = inspect.signature(measure).bind("folder", seed=0, job=None, **chosen.arguments).arguments
    assert given["pairs"] == 3
    assert given["new_tokens"] == 5
    assert given["n_windows"] == chosen.n_windows
    assert given["threads"] == chosen.threads
