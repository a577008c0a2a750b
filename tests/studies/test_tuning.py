"""Searches by validation loss: what runs how far, what is never looked at, and what comes of it."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

import fedmira
from fedmira.config import Config, dump_config, load_config
from fedmira.errors import ConfigError, RunError, RunFolderError
from fedmira.experiment import build_experiment, resume_experiment, run_experiment
from fedmira.model import BaseModel
from fedmira.observers import Observer, RoundEvent, StartEvent, Stop
from fedmira.studies import Search, Tuning, compare_algorithms, tune_methods, tune_settings
from fedmira.studies.ground import CommonGround
from small import PROGRAM, adapter_bytes, call_main, environment, events_of, make_config, table_of

SPACE: Mapping[str, Any] = {
    "local.learning_rate": [0.002, 0.01, 0.05],
    "algorithm.coupling": [0.2, 0.6, 1.0],
}
SMALL: Mapping[str, Any] = {"local.learning_rate": [0.005, 0.02]}
RANDOM = Search(method="random", trials=2, seeds=(5,))


class PowerCut(BaseException):
    """Raised in the middle of a run."""


class Watch(Observer):
    """Notes which runs begin and which rounds they go through; cuts the power in one of them."""

    def __init__(self, cut: tuple[str, int] = ("", 0)) -> None:
        self.began: list[str] = []
        self.rounds: list[tuple[str, int]] = []
        self.cut = cut

    def on_start(self, event: StartEvent) -> None:
        self.began.append(event.run.name)

    def on_round(self, event: RoundEvent) -> None:
        self.rounds.append((event.run.name, event.round))
        if (event.run.name, event.round) == self.cut:
            raise PowerCut


@pytest.fixture(scope="module")
def config(base_folder: Path, clients_folder: Path) -> Config:
    return make_config(
        base_folder,
        clients_folder,
        {"graph.kind": "category", "rounds.count": 4, "local.schedule": "cosine"},
    )


@pytest.fixture(scope="module")
def halved(
    config: Config, base: BaseModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tuning, Watch]:
    """Nine trials at rate 3, one seed; base_folder's base is loaded already."""
    watch = Watch()
    folder = tmp_path_factory.mktemp("tune") / "halving"
    search = Search(trials=9, rate=3, seeds=(5,), budgets=(1, 2, 4))
    return tune_settings(config, SPACE, search, folder, [watch], base=base), watch


def last_losses(folder: Path, number: int) -> float:
    """Mean over clients of the validation loss after a round."""
    return fmean(
        event["validation_loss"]
        for event in events_of(folder)
        if event["event"] == "evaluate" and event["round"] == number
    )


def test_halving_runs_nine_three_and_one_and_keeps_the_best(halved: tuple[Tuning, Watch]) -> None:
    tuning, watch = halved
    assert tuning.document["stages"] == [
        {"rounds": 1, "trials": 9},
        {"rounds": 2, "trials": 3},
        {"rounds": 4, "trials": 1},
    ]
    assert [sum(at == number for _, at in watch.rounds) for number in (1, 2, 3, 4)] == [9, 3, 1, 1]
    folders = {number: tuning.folder / "trials" / f"{number:03d}-seed5" for number in range(1, 10)}
    after_one = sorted(folders, key=lambda number: last_losses(folders[number], 1))
    second = {name for name, at in watch.rounds if at == 2}
    assert second == {folders[number].name for number in after_one[:3]}
    after_two = min(after_one[:3], key=lambda number: last_losses(folders[number], 2))
    best = tuning.document["best"]
    assert best["number"] == after_two
    assert best["loss"] == pytest.approx(last_losses(folders[after_two], 4))


def test_a_trial_that_was_held_twice_is_the_run_that_never_was(
    halved: tuple[Tuning, Watch], base: BaseModel, tmp_path: Path
) -> None:
    """Its schedule is that of all four rounds from the first on."""
    tuning, _ = halved
    trial = tuning.folder / "trials" / f"{tuning.document['best']['number']:03d}-seed5"
    config = load_config(trial / "config.toml")
    assert config.rounds.count == 4 and config.local.schedule == "cosine"
    ground = CommonGround(config.model, {"straight": {5: tmp_path / "run"}}, base, tested=False)
    run_experiment(build_experiment(config, base, dataset=ground.dataset(config)), tmp_path / "run")
    assert adapter_bytes(trial) == adapter_bytes(tmp_path / "run")
    assert [row["train_loss"] for row in table_of(trial, "rounds", timing=False)] == [
        row["train_loss"] for row in table_of(tmp_path / "run", "rounds", timing=False)
    ]
    assert last_losses(trial, 4) == last_losses(tmp_path / "run", 4)


@pytest.mark.parametrize("name", ["two-level", "mira"])
def test_a_run_that_is_held_goes_on_to_the_same_bytes(
    config: Config, base: BaseModel, tmp_path: Path, name: str
) -> None:
    """Also where a method follows the length of the run, as the horizon of two levels does."""
    config = make_config(
        config.model.base,
        config.data.path,
        {"algorithm.name": name, "rounds.count": 4, "evaluation.every": 1},
    )
    experiment = build_experiment(config, base)
    straight = run_experiment(experiment, tmp_path / "straight")
    held = run_experiment(build_experiment(config, base), tmp_path / "held", until=2)
    document = json.loads((tmp_path / "held" / "run.json").read_text(encoding="utf-8"))
    assert (held.status, straight.status) == ("stopped", "finished")
    assert document["rounds_done"] == 2 and document["error"].startswith("held after round 2 of 4")
    assert not (tmp_path / "held" / "checkpoint" / "round-000003").exists()
    again = resume_experiment(
        build_experiment(config, base, tmp_path / "held"), tmp_path / "held", until=9
    )
    assert again.status == "finished", "a later round than the last is the last"
    assert adapter_bytes(tmp_path / "held") == adapter_bytes(tmp_path / "straight")
    assert events_of(tmp_path / "held", timing=False) == events_of(
        tmp_path / "straight", timing=False
    )


def test_the_folders_of_trials_hold_no_test_figure(halved: tuple[Tuning, Watch]) -> None:
    tuning, _ = halved
    for folder in (tuning.folder / "trials").iterdir():
        assert all(
            "test_loss" not in event and "test_tokens" not in event for event in events_of(folder)
        )
        for row in table_of(folder, "clients"):
            tested = [name for name in row if "loss" in name and name != "best_validation_loss"]
            assert tested and all(row[name] == "" for name in [*tested, "rouge_l", "exact_match"])
            assert row["test_rows"] == "0"
        assert all(row["test_loss"] == "" for row in table_of(folder, "rounds"))
        index = json.loads((folder / "adapters" / "index.json").read_text(encoding="utf-8"))
        assert all(entry["metrics"] == {} for entry in index.values())
        document = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        assert document["summary"] == {} and document["export"]["checked"] == []
        assert "test rows were set aside" in document["notes"][-1]


def write_tested(folder: Path, answer: str) -> Path:
    """Two clients with test files of their own, whose answers are made up."""
    for name, shift in (("apple-1", 0), ("birch-1", 7)):
        (folder / name).mkdir(parents=True)
        for part, count in (("train", 12), ("test", 4)):
            rows = [
                {
                    "instruction": "w1 w2",
                    "input": f"w{place + 20 * (part == 'test')} w{place}",
                    "output": answer if part == "test" else f"w{60 + (place + shift) % 9}",
                }
                for place in range(count)
            ]
            (folder / name / f"{part}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
            )
    return folder


def test_other_answers_of_test_rows_change_nothing(
    base_folder: Path, base: BaseModel, tmp_path: Path
) -> None:
    found = []
    for answer in ("w3", "w80 w81 w82"):
        data = write_tested(tmp_path / answer.split()[0], answer)
        config = make_config(base_folder, data, {"algorithm.name": "fedavg", "rounds.count": 2})
        folder = tmp_path / f"tuned-{answer.split()[0]}"
        tune_settings(config, SMALL, RANDOM, folder, base=base)
        found.append((folder / "trials.csv").read_bytes())
    assert found[0] == found[1]


def test_without_validation_rows_nothing_is_trained(
    base_folder: Path, clients_folder: Path, base: BaseModel, tmp_path: Path
) -> None:
    config = make_config(base_folder, clients_folder, {"data.validation_fraction": 0.0})
    with pytest.raises(ConfigError, match="5 of 5 clients have no validation rows .*set data.val"):
        tune_settings(config, SMALL, RANDOM, tmp_path / "tuned", base=base)
    assert not (tmp_path / "tuned").exists()


def test_settings_that_do_not_go_together_are_told_before_any_trial(
    config: Config, base: BaseModel, tmp_path: Path
) -> None:
    space = {"local.epochs": [0, 1], "local.steps_per_row": [0.0, 0.5]}
    with pytest.raises(ConfigError, match=r"the trial .*both say how many steps"):
        tune_settings(config, space, replace(RANDOM, trials=4), tmp_path / "tuned", base=base)
    assert not (tmp_path / "tuned").exists()


def test_a_search_that_was_cut_off_goes_on_and_ends_alike(
    config: Config, base: BaseModel, halved: tuple[Tuning, Watch], tmp_path: Path
) -> None:
    tuning, whole = halved
    search = Search(trials=9, rate=3, seeds=(5,), budgets=(1, 2, 4))
    name = f"{tuning.document['best']['number']:03d}-seed5"
    with pytest.raises(PowerCut):
        tune_settings(config, SPACE, search, tmp_path / "cut", [Watch((name, 3))], base=base)
    assert json.loads((tmp_path / "cut" / "tune.json").read_text())["complete"] is False
    watch = Watch()
    again = tune_settings(config, SPACE, search, tmp_path / "cut", [watch], base=base)
    assert watch.rounds == [(name, 4)], "round 3 was saved before the power went"
    assert again.rows == tuning.rows and again.best == tuning.best
    silent = Watch()
    tune_settings(config, SPACE, search, tmp_path / "cut", [silent], base=base)
    assert silent.began == [] and len(whole.began) == 13


def test_a_killed_command_is_continued_by_the_same_command(config: Config, tmp_path: Path) -> None:
    file, folder = tmp_path / "config.toml", tmp_path / "tuned"
    file.write_text(dump_config(config), encoding="utf-8")
    words = ["tune", str(file), "--method", "random", "--trials", "3", "--seeds", "5,6"]
    words += ["--output", str(folder), "--format", "json"]
    process = subprocess.Popen(
        [PROGRAM, *words],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    moment = folder / "trials" / "002-seed5" / "checkpoint" / "round-000001"
    deadline = time.monotonic() + 120
    while not moment.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    first = (folder / "trials" / "001-seed5" / "run.json").read_bytes()
    ended = call_main(*words)
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    assert (folder / "trials" / "001-seed5" / "run.json").read_bytes() == first, "not run again"
    resumed = json.loads((folder / "trials" / "002-seed5" / "run.json").read_bytes())["resumed"]
    assert len(resumed) == 1
    assert [row["standing"] for row in document["rows"]].count("chosen") == 1
    assert {trial["status"] for trial in document["trials"]} == {"chosen", "finished"}


def test_the_page_shows_all_trials_and_how_close_the_next_are(
    halved: tuple[Tuning, Watch], config: Config
) -> None:
    tuning, _ = halved
    page = tuning.page.read_text(encoding="utf-8")
    assert page.count('<th scope="row">') >= 9 and "Test rows were set aside" in page
    with (tuning.folder / "trials.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and rows[0]["standing"] == "chosen" and rows[0]["difference"] == ""
    for row in tuning.rows[1:]:
        common = row["rounds"]
        folders = [
            tuning.folder / "trials" / f"{number:03d}-seed5"
            for number in (row["trial"], tuning.document["best"]["number"])
        ]
        own, best = (last_losses(folder, common) for folder in folders)
        assert row["difference"] == pytest.approx(own - best)
        assert row["low"] <= row["difference"] <= row["high"]
        assert row["standing"] == ("worse" if row["low"] > 0 else "close")
    for note in tuning.document["edges"]:
        assert note.split(" lies")[0] in page
    assert any("0.05 lies on the edge" in note for note in tuning.document["edges"]), (
        "this little training wants the largest rate"
    )
    assert "with one seed noise is not measured" in " ".join(tuning.document["notes"])
    assert "<table" in tuning._repr_html_() and len(tuning.table) == 9


def test_the_loss_at_the_best_round_is_each_clients_own(
    config: Config, base: BaseModel, tmp_path: Path
) -> None:
    often = config.model_copy(
        update={"evaluation": config.evaluation.model_copy(update={"every": 1})}
    )
    search = replace(RANDOM, at="best")
    tuning = tune_settings(often, SMALL, search, tmp_path / "tuned", base=base)
    for trial in tuning.document["trials"]:
        losses: dict[str, list[float]] = {}
        for event in events_of(tuning.folder / trial["folders"]["5"]):
            if event["event"] == "evaluate":
                losses.setdefault(event["client"], []).append(event["validation_loss"])
        assert trial["loss"] == pytest.approx(fmean(map(min, losses.values())))


def test_a_trial_that_diverges_is_named_and_the_others_go_on(
    config: Config, base: BaseModel, tmp_path: Path
) -> None:
    space = {"local.learning_rate": [0.02, 3e38], "local.max_grad_norm": [0.0]}
    tuning = tune_settings(config, space, RANDOM, tmp_path / "tuned", base=base)
    assert tuning.best["local.learning_rate"] == 0.02
    assert [row["standing"] for row in tuning.rows] == ["chosen", "failed"]
    failed = next(each for each in tuning.document["trials"] if each["status"] == "failed")
    assert failed["problem"].startswith("seed 5: ") and failed["loss"] is None
    assert failed["problem"].split(":")[0] in tuning.page.read_text(encoding="utf-8")
    only = {"local.learning_rate": [3e38], "local.max_grad_norm": [0.0]}
    with pytest.raises(RunError, match="all 1 trials failed .*search lower values"):
        tune_settings(config, only, RANDOM, tmp_path / "none", base=base)


def test_a_trial_that_an_observer_ends_counts_where_it_ended(
    config: Config, base: BaseModel, tmp_path: Path
) -> None:
    class AfterTwo(Observer):
        def on_round(self, event: RoundEvent) -> Stop | None:
            return Stop("enough") if event.round == 2 else None

    often = config.model_copy(
        update={"evaluation": config.evaluation.model_copy(update={"every": 1})}
    )
    tuning = tune_settings(often, SMALL, RANDOM, tmp_path / "tuned", [AfterTwo()], base=base)
    for trial in tuning.document["trials"]:
        assert trial["loss"] == pytest.approx(last_losses(tuning.folder / trial["folders"]["5"], 2))
    silent = Watch()
    tune_settings(often, SMALL, RANDOM, tmp_path / "tuned", [silent], base=base)
    assert silent.began == []


def test_a_folder_of_another_search_is_refused_and_more_trials_are_added(
    config: Config, base: BaseModel, tmp_path: Path
) -> None:
    folder, space = tmp_path / "tuned", {"local.learning_rate": [0.005, 0.01, 0.02]}
    tune_settings(config, space, RANDOM, folder, base=base)
    watch = Watch()
    more = tune_settings(config, space, replace(RANDOM, trials=3), folder, [watch], base=base)
    assert len(more.rows) == 3 and watch.began == ["003-seed5"]
    for changed, said in (
        (replace(RANDOM, trials=3, seeds=(6,)), r"seeds \(was \[5\], is \[6\]\)"),
        (RANDOM, r"trials \(was 3, is 2\)"),
    ):
        with pytest.raises(RunFolderError, match=said):
            tune_settings(config, space, changed, folder, base=base)
    with pytest.raises(RunFolderError, match="the config"):
        other = config.model_copy(update={"seed": 9})
        tune_settings(other, space, replace(RANDOM, trials=3), folder, base=base)
    with pytest.raises(RunFolderError, match="holds no search"):
        tune_settings(config, space, RANDOM, folder / "trials", base=base)


@pytest.mark.parametrize(
    ("search", "said"),
    [
        (Search(trials=0), "trials is 0"),
        (Search(seeds=(1, 1)), "each once"),
        (Search(method="random", budgets=(1, 2)), "budgets are the stages of halving"),
        (Search(method="grid"), "must be halving or random or tpe"),  # type: ignore[arg-type]
        (Search(trials=2, budgets=(1, 2)), "the last is rounds.count = 4"),
        (Search(trials=1), "both must be 2 or more"),
    ],
)
def test_wrong_choices_are_told_before_training(
    config: Config, base: BaseModel, tmp_path: Path, search: Search, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        tune_settings(config, SPACE, search, tmp_path / "tuned", base=base)


@pytest.fixture(scope="module")
def tuned(config: Config, base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, tuned with seeds 5 and 6."""
    folder = tmp_path_factory.mktemp("tuned") / "both"
    space = {**SMALL, "algorithm.coupling": [0.3]}
    found = tune_methods(
        config, ["fedavg", "mira"], space, replace(RANDOM, seeds=(5, 6)), folder, base=base
    )
    assert list(found["fedavg"].best) == ["local.learning_rate"]
    assert "algorithm.coupling of the space" in found["fedavg"].document["notes"][0]
    assert found["mira"].best["algorithm.coupling"] == 0.3
    assert found["mira"].document["best"]["spread"] > 0
    return folder


def test_the_best_settings_are_a_complete_config(
    tuned: Path, config: Config, base: BaseModel
) -> None:
    best = load_config(tuned / "mira" / "best.toml")
    assert best.algorithm.name == "mira" and best.seed == config.seed
    assert best.evaluation == config.evaluation and best.data == config.data
    assert call_main("check", tuned / "mira" / "best.toml").code == 0


def test_each_method_is_compared_with_its_own_tuned_settings(
    tuned: Path, config: Config, base: BaseModel, tmp_path: Path
) -> None:
    comparison = compare_algorithms(
        config,
        ["fedavg", "mira"],
        [7],
        tmp_path / "compared",
        base=base,
        tuned=tuned,
        variants={"untuned": ["algorithm.name=fedavg"]},
        controls=True,
    )
    for name in ("fedavg", "mira"):
        best = load_config(tuned / name / "best.toml")
        run = load_config(comparison.runs[f"{name}-seed7"] / "config.toml")
        assert (run.local, run.algorithm) == (best.local, best.algorithm)
    told = json.loads((tmp_path / "compared" / "comparison.json").read_text())["tuned"]
    for control, changes in best.algorithm.controls.items():
        run = load_config(comparison.runs[f"mira-{control}-seed7"] / "config.toml")
        assert run.local == best.local, "a control has the tuned settings of its method"
        assert told[f"mira-{control}"] == {"control_of": "mira", "values": dict(changes)}
    assert told["mira"]["seeds"] == [5, 6] and told["mira"]["values"]["algorithm.coupling"] == 0.3
    page = comparison.page.read_text(encoding="utf-8")
    assert "algorithm.coupling = 0.3" in page and "as given, not tuned" in page
    assert "as mira, but for graph.shuffled = true" in page
    assert "seeds 5, 6" in page and "split anew for each seed" in page


def test_seeds_that_were_tuned_on_are_not_compared_on(
    tuned: Path, config: Config, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"seed 6 \(fedavg, mira\).*such as 7,8"):
        compare_algorithms(config, ["fedavg", "mira"], [6, 9], tmp_path / "compared", tuned=tuned)
    assert not (tmp_path / "compared").exists()


def test_other_settings_than_those_tuned_with_are_refused(
    tuned: Path, config: Config, tmp_path: Path
) -> None:
    other = config.model_copy(update={"local": config.local.model_copy(update={"steps": 3})})
    with pytest.raises(ConfigError, match="local.steps is 3 here and was 2"):
        compare_algorithms(other, ["mira"], [7], tmp_path / "compared", tuned=tuned)
    with pytest.raises(RunFolderError, match=r"no tuned settings of local .*fedmira tune --algo"):
        compare_algorithms(config, ["local"], [7], tmp_path / "compared", tuned=tuned)
    with pytest.raises(RunFolderError, match="tuned is 'mira', and 'local' is compared"):
        compare_algorithms(config, ["local"], [7], tmp_path / "compared", tuned=tuned / "mira")


def test_tuned_settings_that_change_the_budget_are_not_compared(
    config: Config, base: BaseModel, tmp_path: Path
) -> None:
    mira = tmp_path / "tuned" / "mira"
    tune_settings(config, {"local.steps": [3]}, replace(RANDOM, trials=1), mira, base=base)
    with pytest.raises(ConfigError, match="mira, as it was tuned, changes local.steps"):
        compare_algorithms(config, ["mira"], [7], tmp_path / "c", tuned=tmp_path / "tuned")


class Half(fedmira.methods.Local):
    """A method that is an object, with a setting of its own."""

    pull: float = fedmira.setting(0.5, ge=0, le=1, help="nothing here")


def test_objects_are_tuned_from_python(base: BaseModel, tmp_path: Path) -> None:
    rows = [{"instruction": "w1", "input": f"w{n}", "output": f"w{n + 1}"} for n in range(12)]
    tuning = fedmira.tune(
        method=Half(pull=0.25),
        clients={"north": rows, "south": rows[::-1]},
        base=base,
        settings={
            "rounds.count": 1,
            "local.steps": 1,
            "data.prompt": "plain",
            "data.max_length": 64,
            "data.train_fraction": 0.6,
            "data.validation_fraction": 0.2,
            "engine.token_budget": 400,
        },
        space={"algorithm.pull": [0.25, 0.75]},
        search="random",
        seeds=[5],
        output=tmp_path / "tuned",
    )
    assert tuning.best == {"algorithm.pull": 0.25}, "equal losses: the first that was drawn"
    assert tuning.config.algorithm == Half(pull=0.25)
    assert tuning.document["close"] == [2]
    assert "made of Python objects" in (tuning.folder / "best.toml").read_text(encoding="utf-8")
