"""The suite: asks what it is told, in order, and refuses at the start what it could not ask later."""

from dataclasses import replace

import pytest

from evals.suite import TASKS, EvalsSettings, Task, check_suite, is_due, run_suite, tasks_of
from settings import Refusal, to_dict, validate

TABLES = {
    "held_out": {"lengths": [32, 64], "tokens": 256, "sources": ["web"]},
    "needle": {"lengths": [48], "haystack": "web", "samples": 2, "depths": [0.0, 1.0]},
    "many_needles": {"lengths": [128], "haystack": "web", "samples": 2, "forms": ["multi_value"]},
    "passkey": {"lengths": [320], "samples": 1, "depths": [0.5]},
    "ruler": {"lengths": [1024], "samples": 2, "tasks": ["niah_single_1"], "haystack": "web"},
    "positions": {"length": 64, "buckets": 2, "tokens": 256, "sources": ["web"]},
    "last_tokens": {"length": 64, "tokens": 256, "sources": ["web"]},
    "long_ppl": {"length": 64, "tokens": 256, "sources": ["web"]},
    "mqar": {"lengths": [32], "pairs": [4], "samples": 2},
    "induction": {"lengths": [32], "samples": 2},
    "copying": {"lags": [16], "samples": 2},
    "k_shot_copy": {"shots": [0, 2], "samples": 2},
    "routing": {"length": 32, "tokens": 256, "sources": ["web"]},
    "routing_positions": {"length": 64, "buckets": 2, "tokens": 256, "sources": ["web"]},
}


def evals(**table) -> EvalsSettings:
    return validate(table, EvalsSettings, "run.toml")


def test_every_task_has_a_table_of_its_name():
    assert set(TASKS) == set(TABLES) and set(TASKS) <= set(EvalsSettings.model_fields)


def test_all_tables_are_asked_in_order(models, materials):
    settings = evals(**TABLES)
    model = models.RandomModel(experts=3)
    cells = run_suite(model, settings, materials)
    tasks = list(dict.fromkeys(cell.task.split("/")[0] for cell in cells))
    assert tasks == list(TABLES) == list(TASKS)
    assert cells == run_suite(model, settings, materials)
    assert cells != run_suite(model, settings.model_copy(update={"seed": 1}), materials)
    assert model.training


def test_tasks_choose_among_the_tables(models, materials):
    settings = evals(**TABLES, tasks=["routing", "held_out"])
    assert tasks_of(settings) == ["routing", "held_out"]
    assert tasks_of(evals(**TABLES, tasks=[])) == [] and tasks_of(evals()) == []
    assert run_suite(models.RandomModel(), evals(), materials) == []


def test_unknown_tasks_are_refused_with_the_nearest():
    with pytest.raises(Refusal, match="unknown task 'neddle'; did you mean 'needle'"):
        evals(**TABLES, tasks=["neddle"])
    with pytest.raises(Refusal, match=r"'needle', which has no table; add \[evals.needle\]"):
        evals(tasks=["needle"])
    with pytest.raises(Refusal, match=r"tasks: 'needle' stands twice; give it once"):
        evals(**TABLES, tasks=["needle", "mqar", "needle"])
    with pytest.raises(Refusal, match=r"needle.lenghts: unknown key.*did you mean 'lengths'"):
        evals(needle={"lenghts": [64], "lengths": [64], "haystack": "web"})


def test_what_cannot_be_asked_is_refused_before_the_model_is(models, materials):
    model = models.RandomModel()
    with pytest.raises(Refusal, match=r"evals.positions.length=9999"):
        check_suite(evals(**{**TABLES, "positions": {"length": 9999}}), materials)
    with pytest.raises(Refusal):
        run_suite(model, evals(**{**TABLES, "positions": {"length": 9999}}), materials)
    assert not model.calls
    check_suite(evals(), replace(materials, held_out={}))


def test_what_a_task_leaves_out_of_itself_is_said_beforehand(models, materials, monkeypatch):
    said = []

    def speak(model, settings, materials, seed):
        assert said == ["needle leaves out"]
        return []

    monkeypatch.setitem(TASKS, "needle", Task(lambda settings, materials: "needle leaves out", speak))
    run_suite(models.RandomModel(), evals(**TABLES, tasks=["copying", "needle"]), materials, say=said.append)
    assert check_suite(evals(**TABLES, tasks=["copying", "needle"]), materials) == said


ARRAYS = [(task, key) for task, table in TABLES.items() for key in table if isinstance(table[key], list)]


@pytest.mark.parametrize(("task", "key"), ARRAYS)
def test_an_entry_that_stands_twice_is_refused(task, key):
    """It would be asked twice, and its cells would lie over each other."""
    entries = TABLES[task][key]
    with pytest.raises(Refusal, match=rf"{task}.{key}=.*twice"):
        evals(**{task: {**TABLES[task], key: [*entries, entries[0]]}})


def test_settings_survive_the_resolved_config():
    settings = evals(**TABLES, every_tokens=1000, tasks=["needle"])
    assert validate(to_dict(settings), EvalsSettings, "again") == settings


def test_due_at_each_multiple_once():
    settings = evals(every_tokens=1000)
    due = [tokens for tokens in range(300, 4501, 300) if is_due(settings, tokens - 300, tokens, is_stage_end=False)]
    assert due == [1200, 2100, 3000, 4200]
    assert is_due(settings, 0, 300, is_stage_end=True)
    assert not is_due(evals(at_stage_ends=False), 0, 300, is_stage_end=True)
    assert not is_due(evals(), 0, 10**9, is_stage_end=False)
