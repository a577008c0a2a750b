"""What users do wrong: exit code 2 and a message on stderr.

It names the thing and the next step; nothing is on stdout, and there is no traceback.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from small import command, write_clients


def assert_refused(ended: Any, *patterns: str, code: int = 2) -> None:
    """A refusal with all of these in its message."""
    assert ended.code == code, ended.err
    assert ended.out == "" and "Traceback" not in ended.err
    for pattern in patterns:
        assert re.search(pattern, " ".join(ended.err.split())), (
            f"{pattern!r} is not in {ended.err!r}"
        )


def test_a_refusal_of_the_installed_command_is_short(tmp_path: Path) -> None:
    ended = command(
        "run", "--set", "lokal.steps=3", "--set", "rounds.count=0", "--output", tmp_path / "run"
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    second, first = sorted(ended.stderr.splitlines(), reverse=True)
    assert re.fullmatch(r"error: lokal = .*unknown key; did you mean local\?.*\(--set\)", first)
    assert re.fullmatch(r"error: rounds\.count = 0: must be 1 or more \(--set\)", second)
    assert not (tmp_path / "run").exists()


def test_a_config_that_is_missing_or_broken_is_named(
    fedmira: Callable[..., Any], tmp_path: Path
) -> None:
    assert_refused(
        fedmira("run", tmp_path / "none.toml"),
        r"none\.toml: there is no such config file",
        "fedmira presets lists them",
    )
    (tmp_path / "broken.toml").write_text("seed = 1\n[rounds\ncount = 3\n", encoding="utf-8")
    assert_refused(
        fedmira("check", tmp_path / "broken.toml"), r"broken\.toml:2:\d+: not valid TOML"
    )
    assert_refused(
        fedmira("run", "--preset", "mira-nii"), "mira-nii", "did you mean 'mira-ni'|mira-ni"
    )


def test_a_config_in_yaml_and_text_without_quotes_are_told_what_toml_wants(
    fedmira: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text("rounds:\n  count: 5\n", encoding="utf-8")
    assert_refused(
        fedmira("run", tmp_path / "run.yaml"),
        r"run\.yaml ends in \.yaml, and a config is TOML",
        r"docs/configuration\.md",
    )
    (tmp_path / "run.toml").write_text("[data]\nsource = jsonl\n", encoding="utf-8")
    assert_refused(
        fedmira("check", tmp_path / "run.toml"),
        r"run\.toml:2:10: not valid TOML: Invalid value; text needs quotes: 'jsonl'",
    )


def test_all_wrong_keys_are_told_together(fedmira: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "wrong.toml").write_text(
        "[local]\nstep = 3\n[algorithm]\nname = 'mirra'\n", encoding="utf-8"
    )
    ended = fedmira("run", tmp_path / "wrong.toml", "--set", "local.optimizer=adamv")
    assert_refused(
        ended,
        r"local\.step = 3: unknown key; did you mean local\.steps",
        "did you mean 'mira'",
        r"local\.optimizer = .adamv.: must be one of adamw",
    )
    assert ended.err.count("error: ") == 3


def test_data_that_is_not_there_is_named_with_what_was_looked_for(
    config_file: Path, fedmira: Callable[..., Any], tmp_path: Path
) -> None:
    for verb in ("run", "check"):
        ended = fedmira(verb, config_file, "--set", f"data.path={tmp_path / 'nowhere'}")
        assert_refused(
            ended, r"data\.path '.*nowhere' does not exist; jsonl needs PATH/<client>/train\.jsonl"
        )


def test_broken_lines_are_named_with_file_and_line_all_together(
    config_file: Path, fedmira: Callable[..., Any], tmp_path: Path
) -> None:
    data = write_clients(tmp_path / "data")
    for client, number, text in (
        ("apple-1", 3, '{"instruction": "w1", '),
        ("birch-2", 2, json.dumps({"instruction": "w1", "reply": "w2"})),
    ):
        path = data / client / "train.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()
        lines[number - 1] = text
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    ended = fedmira("run", config_file, "--set", f"data.path={data}", "--output", tmp_path / "run")
    assert_refused(
        ended,
        r"apple-1/train\.jsonl:3: broken JSON",
        r"birch-2/train\.jsonl:2: missing key 'output' or 'response', found instruction, reply",
    )
    assert not (tmp_path / "run").exists()


def test_a_base_that_is_not_there_is_named(
    config_file: Path, fedmira: Callable[..., Any], tmp_path: Path
) -> None:
    assert_refused(
        fedmira("run", config_file, "--set", "model.base=./no-such-base"),
        r"model\.base '\./no-such-base': there is no such folder",
        "'bundled'",
    )
    assert_refused(
        fedmira("run", config_file, "--set", f"model.base={tmp_path}"),
        r"the folder has no config\.json",
    )


def test_a_target_that_is_not_there_lists_those_that_are(
    config_file: Path, fedmira: Callable[..., Any]
) -> None:
    assert_refused(
        fedmira("check", config_file, "--set", "adapter.targets=['q_prj']"),
        "'q_prj' is no linear layer of LlamaForCausalLM; choose from .*q_proj",
    )


def test_a_taken_output_is_never_overwritten(command_run: Any, fedmira: Callable[..., Any]) -> None:
    before = {path: path.stat().st_mtime_ns for path in command_run.folder.rglob("*")}
    assert_refused(
        fedmira("run", command_run.config, "--output", command_run.folder),
        "exists already and is never overwritten; choose another --output, or .*--resume",
    )
    assert {path: path.stat().st_mtime_ns for path in command_run.folder.rglob("*")} == before


def test_resume_needs_the_folder_and_nothing_else(
    command_run: Any, fedmira: Callable[..., Any], tmp_path: Path
) -> None:
    assert_refused(
        fedmira("run", "--resume"), "--resume needs --output: the folder of the run to continue"
    )
    assert_refused(
        fedmira("run", "--resume", "--output", tmp_path / "nowhere"),
        "there is no such folder; give the folder that an earlier run printed",
    )
    assert_refused(
        fedmira("run", command_run.config, "--resume", "--output", command_run.folder),
        "leave the config, --preset and --set away",
    )
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("verb", ["evaluate", "report"])
def test_verbs_on_runs_name_a_folder_that_is_none(
    verb: str, fedmira: Callable[..., Any], tmp_path: Path
) -> None:
    ended = fedmira(verb, tmp_path)
    assert ended.code == 2 and ended.out == "" and str(tmp_path) in ended.err.replace("\n", "")


def test_an_unknown_client_lists_those_that_exist(
    command_run: Any, fedmira: Callable[..., Any]
) -> None:
    assert_refused(
        fedmira("generate", command_run.folder, "--client", "pear", "w1"),
        "no client 'pear' in this run; its clients are apple-1",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--algorithms", ""), "--algorithms is empty"),
        (("--algorithms", "local,mirra"), "mirra.*did you mean 'mira'"),
        (("--algorithms", "local", "--seeds", "0,x"), "--seeds '0,x': must be whole numbers"),
        (("--algorithms", "local", "--seeds", "-1"), "all 0 or more"),
    ],
)
def test_compare_checks_its_lists_before_anything_runs(
    arguments: tuple[str, ...],
    message: str,
    config_file: Path,
    fedmira: Callable[..., Any],
    tmp_path: Path,
) -> None:
    assert_refused(
        fedmira("compare", config_file, *arguments, "--output", tmp_path / "all"), message
    )
    assert not (tmp_path / "all").exists()


def test_options_that_do_not_exist_are_click_s_own_refusal(fedmira: Callable[..., Any]) -> None:
    for arguments in (
        ("run", "--outptu", "x"),
        ("trian",),
        ("generate", "x"),
        ("run", "--format", "xml"),
    ):
        ended = fedmira(*arguments)
        assert ended.code == 2 and ended.out == "" and "Traceback" not in ended.err


def test_a_run_that_fails_has_exit_code_3_and_keeps_what_it_has(
    config_file: Path, fedmira: Callable[..., Any], tmp_path: Path
) -> None:
    ended = fedmira(
        "run",
        config_file,
        "--set",
        "local.learning_rate=1e38",
        "--output",
        tmp_path / "run",
        "--format",
        "json",
    )
    assert ended.code == 3 and ended.out == "" and "Traceback" not in ended.err
    assert re.search(
        r"error: round 1: none of 3 clients sent a usable reply .*lower local\.learning_rate",
        ended.err,
    )
    assert (
        json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["status"]
        == "failed"
    )
    assert (tmp_path / "run" / "report.html").is_file() and (
        tmp_path / "run" / "adapters" / "index.json"
    ).is_file()


def test_a_graph_that_would_never_act_is_refused(
    config_file: Path, fedmira: Callable[..., Any], tmp_path: Path
) -> None:
    ended = fedmira("run", config_file, "--set", "rounds.count=1", "--output", tmp_path / "run")
    assert_refused(
        ended,
        r"graph\.warmup_rounds is 1 and rounds\.count 1: the graph would never act; set "
        r"rounds\.count above the warm-up",
    )
    assert not (tmp_path / "run").exists()
