"""Files, presets and overrides become one config; all that is wrong is said at once."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmira.config import (
    AdapterSettings,
    Config,
    DataSettings,
    GraphSettings,
    LocalSettings,
    dump_config,
    load_config,
    preset_path,
    with_algorithm,
    with_overrides,
)
from fedmira.config.methods import METHODS, method_class, method_names
from fedmira.config.other_names import OTHER_NAMES
from fedmira.config.section import Section, readers_of
from fedmira.config.sections.run import FederationSettings
from fedmira.errors import ConfigError
from fedmira.methods import FedAvg, Local, Mira, TwoLevel


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(
    *overrides: str, path: Path | None = None, preset: str | None = None
) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, preset, overrides)
    return caught.value.problems


# Layers


def test_nothing_at_all_is_the_demo() -> None:
    assert load_config() == Config()


def test_the_file_wins_over_the_preset_and_overrides_win_over_both(tmp_path: Path) -> None:
    path = write(tmp_path, "[rounds]\ncount = 7\nparticipation = 0.5\n")
    preset = load_config(preset="mira-paper-ni")
    config = load_config(path, "mira-paper-ni", ["rounds.participation=0.25"])
    assert (config.rounds.count, config.rounds.participation) == (7, 0.25)
    assert config.local == preset.local
    assert config.algorithm == preset.algorithm


def test_a_later_override_of_a_key_wins() -> None:
    assert load_config(overrides=["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.column=folder/with = sign", "folder/with = sign"),
        ("data.column=", ""),
        ('data.column="3"', "3"),
        ("data.column='C:\\data'", "C:\\data"),
        ("data.column=C:\\data", "C:\\data"),
    ],
)
def test_an_override_is_toml_or_else_plain_text(override: str, expected: str) -> None:
    assert load_config(overrides=["data.source=jsonl", override]).data.column == expected


def test_overrides_take_lists_tables_and_quoted_names() -> None:
    config = load_config(
        overrides=[
            'adapter.targets=["q_proj", "v_proj"]',
            'adapter.ranks."law.v2"=4',
            "adapter.ranks.chat-1=8",
        ]
    )
    assert config.adapter.targets == ("q_proj", "v_proj")
    assert config.adapter.ranks == {"law.v2": 4, "chat-1": 8}


def test_an_override_does_not_reach_other_keys() -> None:
    assert (
        load_config(overrides=["data.source=hub", "data.column=a\nseed = 3"]).data.column
        == "a\nseed = 3"
    )
    assert load_config(overrides=["data.source=hub", "data.column=1\nseed = 3"]).seed == 0


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbfseed = 3\n")
    assert load_config(path).seed == 3


# What an upper layer makes meaningless below


def test_naming_another_algorithm_drops_the_settings_that_it_does_not_have(tmp_path: Path) -> None:
    path = write(tmp_path, '[algorithm]\nname = "mira"\ncoupling = 0.5\n')
    assert load_config(path, overrides=["algorithm.name=fedavg"]).algorithm == FedAvg()


def test_a_file_that_names_another_algorithm_than_the_preset_drops_them_too(tmp_path: Path) -> None:
    path = write(tmp_path, '[algorithm]\nname = "local"\n')
    assert load_config(path, "mira-paper-ni").algorithm == Local()


def test_naming_the_same_algorithm_keeps_its_settings() -> None:
    assert load_config(preset="mira-paper-ni", overrides=["algorithm.name=mira"]) == load_config(
        preset="mira-paper-ni"
    )


def test_settings_that_were_set_together_with_a_foreign_algorithm_are_an_error(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, '[algorithm]\nname = "fedavg"\ncoupling = 0.5\n')
    assert problems(path=path) == (
        "algorithm.coupling = 0.5: unknown key; it belongs to gossip and mira and two-level; "
        f"algorithm fedavg knows: name ({path})",
    )
    [problem] = problems("algorithm.name=fedavg", "algorithm.coupling=0.5")
    assert problem.startswith(
        "algorithm.coupling = 0.5: unknown key; it belongs to gossip and mira and two-level"
    )


def test_settings_without_a_name_belong_to_the_default_algorithm(tmp_path: Path) -> None:
    path = write(tmp_path, "[algorithm]\ncoupling = 0.5\n")
    assert load_config(path).algorithm == TwoLevel(coupling=0.5)


def test_coupling_replaces_a_server_step_below_and_the_other_way_round() -> None:
    config = load_config(preset="mira-paper-ni", overrides=["algorithm.coupling=0.5"])
    assert isinstance(config.algorithm, Mira)
    assert (config.algorithm.coupling, config.algorithm.server_step) == (0.5, None)
    config = load_config(preset="mira-ni", overrides=["algorithm.server_step=0.01"])
    assert isinstance(config.algorithm, Mira)
    assert config.algorithm.server_step == 0.01


def test_steps_replace_epochs_below() -> None:
    # the preset trains in epochs, which would make steps a setting without effect
    assert load_config(preset="mira-paper-ni").local.epochs == 5
    local = load_config(preset="mira-paper-ni", overrides=["local.steps=3"]).local
    assert (local.steps, local.epochs) == (3, 0)


def test_another_kind_of_graph_lets_go_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, '[graph]\nkind = "file"\npath = "graph.json"\n')
    assert load_config(path).graph.path == "graph.json"
    assert load_config(path, overrides=["graph.kind=uniform"]).graph == GraphSettings(
        kind="uniform"
    )


def test_contradictions_within_one_layer_are_errors() -> None:
    mira = "algorithm.name=mira"
    assert problems(mira, "algorithm.coupling=0.5", "algorithm.server_step=0.1") == (
        "algorithm: coupling and server_step say the same thing in two ways; set one of them",
    )
    assert len(problems("graph.kind=random", "graph.path=graph.json")) == 1


def test_steps_and_epochs_in_one_layer_are_an_error_that_names_both(tmp_path: Path) -> None:
    both = (
        "local.steps = 3 and local.epochs = 2: epochs above 0 count passes over the rows in place "
        "of steps; set one of them"
    )
    path = write(tmp_path, "[local]\nsteps = 3\nepochs = 2\n")
    assert problems(path=path) == (f"{both} ({path})",)
    assert problems("local.steps=3", "local.epochs=2") == (f"{both} (--set)",)
    assert load_config(write(tmp_path, "[local]\nsteps = 3\nepochs = 0\n")).local.steps == 3
    assert (
        load_config(
            write(tmp_path, "[local]\nsteps = 3\n"), overrides=["local.epochs=2"]
        ).local.epochs
        == 2
    )


@pytest.mark.parametrize(
    ("choice", "setting", "reader"),
    [
        ("graph.kind=random", "graph.nearest=5", "'similarity' or 'blocks'"),
        ("graph.kind=uniform", "graph.memory=0.2", "'similarity', 'blocks' or 'pfedgraph'"),
        ("graph.kind=category", "graph.warmup_rounds=2", "'similarity', 'blocks' or 'pfedgraph'"),
        ("graph.kind=pfedgraph", "graph.nearest=5", "'similarity' or 'blocks'"),
        ("graph.kind=similarity", "graph.alpha=0.4", "'pfedgraph'"),
        ("graph.kind=similarity", "graph.strength=0.4", "'blocks'"),
        ("graph.kind=pfedgraph", "graph.blocks=3", "'blocks'"),
        ("local.optimizer=adam", "local.sophia_rho=2", "'sophia'"),
        ("local.optimizer=sophia", "local.zeroth_seeds=9", "'zeroth-order'"),
        ("adapter.kind=lora", "adapter.virtual_tokens=9", "'p-tuning', 'prompt' or 'prefix'"),
        ("adapter.kind=lora", "adapter.encoder=lstm", "'p-tuning'"),
        ("adapter.kind=lora", "adapter.prefix_projection=true", "'prefix'"),
        ("data.source=dolly", "data.split_list=lstm", "'natural-instructions'"),
        ("data.source=hub", "data.input_limit=9", "'natural-instructions'"),
        ("data.source=demo", "data.column=lstm", "'jsonl' or 'hub'"),
        ("data.source=jsonl", "data.split=lstm", "'hub'"),
        ("data.partition=task", "data.dirichlet_clients=5", "'dirichlet'"),
        ("data.partition=category", "data.dirichlet_alpha=0.1", "'dirichlet'"),
        ("data.partition=dirichlet", "data.clients_per_category=2", "'category'"),
    ],
)
def test_a_setting_that_the_choice_beside_it_does_not_read_is_an_error(
    choice: str, setting: str, reader: str
) -> None:
    chooser, _, chosen = choice.partition("=")
    key, _, value = setting.partition("=")
    written = f'"{value}"' if value == "lstm" else value  # the only text among them
    expected = (
        f"{key} = {written}: {chooser} = '{chosen}' does not read it; leave it out, or set "
        f"{chooser} to {reader} (--set)"
    )
    assert problems(choice, setting) == (expected,)
    # In a layer above it is told as well; below, it goes with the choice that read it.
    with pytest.raises(ConfigError, match="does not read it"):
        with_overrides(load_config(overrides=[choice]), [setting])


def test_another_choice_lets_go_of_what_only_the_one_below_reads(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '[graph]\nnearest = 5\nmemory = 0.2\n[local]\noptimizer = "sophia"\nsophia_rho = 2\n'
        '[adapter]\nkind = "prompt"\nvirtual_tokens = 9\n'
        '[algorithm]\nname = "mira"\nspace = "factor"\n',
    )
    below, defaults = load_config(path), Config()
    above = ["graph.kind=random", "local.optimizer=adam", "adapter.kind=lora"]
    for config in (load_config(path, overrides=above), with_overrides(below, above)):
        assert (config.graph.nearest, config.graph.memory) == (
            defaults.graph.nearest,
            defaults.graph.memory,
        )
        assert config.local.sophia_rho == defaults.local.sophia_rho
        assert config.adapter.virtual_tokens == defaults.adapter.virtual_tokens
    assert load_config(path, overrides=["graph.kind=pfedgraph"]).graph.memory == 0.2, (
        "both learned graphs read it"
    )


GRAPH_READERS = ["fedalt", "mtlora", "gossip", "mira", "two-level"]


@pytest.mark.parametrize("name", [name for name in METHODS if name not in GRAPH_READERS])
def test_a_graph_is_an_error_under_a_method_that_uses_none(name: str) -> None:
    wanted = {"fedkseed": "zeroth-order", "scaffold": "sgd"}
    optimizer = [f"local.optimizer={wanted[name]}"] if name in wanted else []
    validation = ["data.validation_fraction=0.1"] if name == "fedfomo" else []
    assert problems(f"algorithm.name={name}", "graph.kind=random", *optimizer, *validation) == (
        f"graph.kind = \"random\": algorithm.name = '{name}' does not read it; leave it out, or "
        "set algorithm.name to 'fedalt', 'mtlora', 'gossip', 'mira' or 'two-level' (--set)",
    )


def test_a_graph_below_the_choice_of_a_method_that_uses_none_is_left_alone(tmp_path: Path) -> None:
    path = write(tmp_path, '[graph]\nkind = "random"\n')
    assert load_config(path, overrides=["algorithm.name=local"]).graph.kind == "random"
    written = write(tmp_path, dump_config(load_config(path, overrides=["algorithm.name=local"])))
    assert load_config(written).graph.kind == "random", "a run folder's config is read back"


def test_every_chooser_is_a_key_of_its_section_and_every_reader_one_of_its_values() -> None:
    for name, field in Config.model_fields.items():
        of = field.annotation
        if not (isinstance(of, type) and issubclass(of, Section)):
            continue
        schema = of.model_json_schema()["properties"]
        for key, part in of.model_fields.items():
            for chooser, readers in readers_of(part).items():
                assert set(readers) <= set(schema[chooser]["enum"]), f"{name}.{key}"


def test_a_default_that_nothing_reads_may_be_written_down() -> None:
    assert (
        load_config(
            overrides=["graph.kind=random", f"graph.nearest={GraphSettings().nearest}"]
        ).graph.kind
        == "random"
    )


def test_a_config_made_in_python_is_read_back_whatever_it_does_not_use(tmp_path: Path) -> None:
    config = Config(
        graph=GraphSettings(kind="random", nearest=5),
        local=LocalSettings(steps=3, epochs=2, sophia_rho=2.0),
    )
    path = write(tmp_path, dump_config(config))
    assert load_config(path) == config
    assert problems("graph.nearest=6", path=path)[0].startswith(
        "graph.nearest = 6: graph.kind = 'random' does not read it"
    )


def test_a_shuffled_uniform_graph_controls_nothing() -> None:
    """Weight 1 between all clients is the same after any exchange of them."""
    (problem,) = problems("graph.kind=uniform", "graph.shuffled=true")
    assert problem.startswith("graph.shuffled = true changes nothing with graph.kind = 'uniform'")


def test_with_algorithm_changes_the_algorithm_and_nothing_else() -> None:
    config = load_config(preset="mira-paper-ni")
    changed = with_algorithm(config, "fedavg")
    assert changed.algorithm == FedAvg()
    assert changed.model_copy(update={"algorithm": config.algorithm}) == config
    assert with_algorithm(config, "mira") == config
    with pytest.raises(ConfigError, match="did you mean 'mira'"):
        with_algorithm(config, "miira")


# Errors


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    path = write(tmp_path, 'sed = 1\n[local]\nlearning_rate = -1\n[graph]\nkind = "randm"\n')
    assert set(problems("rounds.count=0", "nonsense", path=path)) == {
        "--set 'nonsense': must be key=value with a dotted key, such as rounds.count=5",
        'graph.kind = "randm": must be one of random, uniform, category, similarity, '
        f"blocks, pfedgraph, file (did you mean 'random'?) ({path})",
        f"local.learning_rate = -1: must be above 0 ({path})",
        "rounds.count = 0: must be 1 or more (--set)",
        "sed = 1: unknown key; did you mean seed? there are: "
        f"{', '.join(Config.model_fields)} ({path})",
    }


@pytest.mark.parametrize(
    ("override", "start"),
    [
        (
            "local.learn_rate=1",
            "local.learn_rate = 1: unknown key; did you mean local.learning_rate?",
        ),
        ("local.rank=4", "local.rank = 4: unknown key; did you mean adapter.rank?"),
        ("learning_rate=1", "learning_rate = 1: unknown key; did you mean local.learning_rate?"),
        (
            "algorithm.name=miraa",
            'algorithm.name = "miraa": unknown algorithm; must be one of '
            f"{', '.join(method_names())}; did you mean 'mira'?",
        ),
        ("algorithm.coupling=2", "algorithm.coupling = 2: must be 1 or less"),
        (
            "algorithm=mira",
            'algorithm = "mira": must be a section; write [algorithm] with any of: name, safeguard',
        ),
        (
            "graph=random",
            'graph = "random": must be a section; write [graph] with any of: kind, path',
        ),
        ("data.max_rows=-1", "data.max_rows = -1: must be 0 or more or a list in brackets"),
        ("data.max_rows=[4, -2]", "data.max_rows.1 = -2: must be 0 or more"),
        (
            "engine.token_budget=few",
            "engine.token_budget = \"few\": must be a whole number or 'auto'",
        ),
        ("adapter.targets=q_proj", 'adapter.targets = "q_proj": must be a list in brackets'),
        ('adapter.ranks."law.v2"=0', 'adapter.ranks."law.v2" = 0: must be 1 or more'),
        ("data.path=3", "data.path = 3: must be text in quotes"),
        ("model.base=", 'model.base = "": must be text that is not empty'),
        ("evaluation.rouge=perhaps", 'evaluation.rouge = "perhaps": must be true or false'),
        ("adapter.alpha=inf", "adapter.alpha = Infinity: must be a finite number"),
        ("local.learning_rate=nan", "local.learning_rate = NaN: must be "),
    ],
)
def test_a_problem_names_key_value_limit_and_next_step(override: str, start: str) -> None:
    [problem] = problems(override)
    assert problem.startswith(start)
    assert problem.endswith("(--set)")


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ('rounds.count = "5"', "a whole number"),
        ("rounds.count = true", "a whole number"),
        ('local.learning_rate = "1e-3"', "a number"),
        ('engine.token_budget = "512"', "a whole number or 'auto'"),
        ('evaluation.rouge = "yes"', "true or false"),
        ("evaluation.rouge = 1", "true or false"),
    ],
)
def test_a_value_of_another_type_in_a_file_is_an_error(
    tmp_path: Path, line: str, wanted: str
) -> None:
    path = write(tmp_path, f"{line}\n")
    assert problems(path=path) == (f"{line}: must be {wanted} ({path})",)
    assert load_config(path, overrides=[f"{line.partition(' ')[0]}=1"]) == load_config(
        overrides=[f"{line.partition(' ')[0]}=1"]
    )


def test_types_in_lists_and_beside_other_problems_are_told_together(tmp_path: Path) -> None:
    path = write(tmp_path, 'seed = "1"\n[data]\nmax_rows = ["4", 8]\n[local]\nsteps = 0\n')
    assert set(problems(path=path)) == {
        f'seed = "1": must be a whole number ({path})',
        f'data.max_rows.0 = "4": must be a whole number ({path})',
        f"local.steps = 0: must be 1 or more ({path})",
    }


def test_whole_numbers_may_stand_for_numbers_and_overrides_are_text_anyway(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "[adapter]\nalpha = 8\n")).adapter.alpha == 8.0
    config = load_config(
        overrides=["local.learning_rate=.5", "evaluation.rouge=False", 'rounds.count="5"']
    )
    assert (config.local.learning_rate, config.evaluation.rouge, config.rounds.count) == (
        0.5,
        False,
        5,
    )


@pytest.mark.parametrize(
    ("other", "ours"),
    [
        ("local.lr", "local.learning_rate"),
        ("adapter.learning_rate", "local.learning_rate"),
        ("local.bs", "local.batch_size"),
        ("adapter.r", "adapter.rank"),
        ("adapter.lora_alpha", "adapter.alpha"),
        ("rounds.num_rounds", "rounds.count"),
        ("num_clients", "data.clients"),
        ("model.model_name_or_path", "model.base"),
        ("data.max_seq_length", "data.max_length"),
        ("local.num_train_epochs", "local.epochs"),
        ("training.lr", "local"),
    ],
)
def test_what_other_tools_call_a_setting_leads_to_ours(other: str, ours: str) -> None:
    [problem] = problems(f"{other}=1")
    assert f": unknown key; did you mean {ours}? " in problem


def test_other_names_lead_to_keys_that_exist_and_are_none_themselves() -> None:
    settings = {
        "algorithm": [
            "name",
            *(field for name in method_names() for field in method_class(name).model_fields),
        ]
    }
    settings |= {
        name: list(type(section).model_fields)
        for name, section in Config()
        if name not in ("seed", "algorithm")
    }
    known = {
        *Config.model_fields,
        *(f"{section}.{key}" for section, keys in settings.items() for key in keys),
    }
    assert set(OTHER_NAMES.values()) <= known
    assert not set(OTHER_NAMES) & known


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1", "mps"])
def test_a_device_has_a_name_that_torch_knows(device: str) -> None:
    assert load_config(overrides=[f"model.device={device}"]).model.device == device


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:one", "0", "CPU"])
def test_a_device_that_torch_has_no_name_for_is_an_error(device: str) -> None:
    [problem] = problems(f'model.device="{device}"')
    assert problem.startswith(
        f"model.device = '{device}': must be 'auto' or a torch device, such as 'cpu', "
        "'cuda', 'cuda:1' or 'mps'"
    )
    assert problem.endswith("did you mean 'cuda'?") == (device == "gpu")


def test_rules_between_keys_are_reported_in_their_own_words() -> None:
    assert problems("data.train_fraction=0.75", "data.validation_fraction=0.25") == (
        "data: train_fraction + validation_fraction is 1; must be below 1 so that test rows remain",
    )
    assert problems("evaluation.select=best") == (
        "evaluation.select = 'best' needs validation rows; set data.validation_fraction above 0",
    )


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ("seed = 1\ncount = = 2\n", 2, 9),
        ("[rounds\ncount = 2\n", 1, 8),
        ("seed = 1\nname = 'open", 2, 13),
    ],
)
def test_broken_toml_is_named_with_file_line_and_column(
    tmp_path: Path, text: str, line: int, column: int
) -> None:
    path = write(tmp_path, text)
    [problem] = problems(path=path)
    assert problem.startswith(f"{path}:{line}:{column}: not valid TOML: ")


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("source = jsonl", "; text needs quotes: 'jsonl'"),
        ("path = /home/data  # mine", "; text needs quotes: '/home/data'"),
        ("rouge = True", "; write true"),
        ("count = ,", ""),
    ],
)
def test_a_bare_word_as_a_value_needs_quotes(tmp_path: Path, line: str, hint: str) -> None:
    path = write(tmp_path, f"seed = 1\n{line}\n")
    assert problems(path=path) == (
        f"{path}:2:{line.index('=') + 3}: not valid TOML: Invalid value{hint}",
    )


@pytest.mark.parametrize("ending", [".yaml", ".yml", ".json"])
def test_a_config_in_another_format_is_told_that_configs_are_toml(
    tmp_path: Path, ending: str
) -> None:
    path = tmp_path / f"run{ending}"
    path.write_text("{}\n", encoding="utf-8")
    [problem] = problems(path=path)
    assert (
        problem.startswith(f"config file {path} ends in {ending}, and a config is TOML")
        and "docs/configuration.md" in problem
    )


def test_unreadable_sources_are_reported_together(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    preset_problem, file_problem, override_problem = problems(
        "x", path=missing, preset="mira-paper"
    )
    assert preset_problem.startswith(
        "preset 'mira-paper' does not exist; did you mean 'mira-paper-ni'?"
    )
    assert file_problem.startswith(f"config file {missing} does not exist")
    assert override_problem.startswith("--set 'x': must be key=value")


def test_a_folder_in_place_of_a_file_is_an_error(tmp_path: Path) -> None:
    [problem] = problems(path=tmp_path)
    assert problem.startswith(f"config file {tmp_path} cannot be read: ")


def test_text_in_another_encoding_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes('[data]\npath = "dös"\n'.encode("latin-1"))
    assert problems(path=path) == (
        f"config file {path} is not UTF-8 text (byte 16); save it as UTF-8",
    )


def test_a_config_error_ends_the_program_with_code_2() -> None:
    assert ConfigError.exit_code == 2


# Dump


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
configs = st.builds(
    Config,
    seed=st.integers(0, 2**63 - 1),
    adapter=st.builds(
        AdapterSettings,
        rank=st.integers(1, 64),
        alpha=st.floats(1e-6, 1e6),
        targets=st.lists(names, max_size=3).map(tuple),
        ranks=st.dictionaries(names, st.integers(1, 64), max_size=3),
    ),
    data=st.builds(
        DataSettings,
        column=names,
        max_rows=st.integers(0, 99)
        | st.lists(st.integers(0, 99), min_size=1, max_size=4).map(tuple),
    ),
    algorithm=st.one_of(
        st.just(Local()),
        st.just(FedAvg()),
        st.builds(
            Mira,
            coupling=st.floats(0, 1),
            neighbours=st.sampled_from(["fresh", "rescaled", "stale"]),
        ),
        st.builds(Mira, server_step=st.floats(0, 10), space=st.sampled_from(["product", "factor"])),
    ),
    local=st.builds(LocalSettings, learning_rate=st.floats(1e-12, 1e3), epochs=st.integers(0, 9)),
)


@given(configs)
def test_a_dumped_config_loads_back_equal(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert load_config(write(Path(folder), dump_config(config))) == config


def test_a_dump_writes_every_default_out() -> None:
    config = Config()
    text = dump_config(config)
    for section, settings in config:
        if section in ("privacy", "server"):  # which is written where something in it is set
            continue
        for key in type(settings).model_fields if section != "seed" else ():
            # unset has no form in TOML; a table has a header of its own
            unset = type(settings).model_fields[key].default is None
            only_where_set = {"ranks", "rank_types", "apart", *FederationSettings.only_where_set}
            if not unset and key not in only_where_set:
                assert f"\n{key} = " in text or f".{key}]" in text, f"{section}.{key}"


def test_a_dumped_config_still_takes_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, dump_config(load_config(preset="mira-paper-ni")))
    assert load_config(path, overrides=["algorithm.name=local"]).algorithm == Local()
    assert load_config(path, overrides=["local.steps=2"]).local.epochs == 0


def test_a_preset_is_the_same_as_its_file() -> None:
    assert load_config(preset="mira-ni") == load_config(preset_path("mira-ni"))


def test_a_measure_belongs_to_learned_graphs_and_goes_with_them() -> None:
    with pytest.raises(
        ConfigError,
        match="measure = 'principal-angles' is for learned graphs, but kind is 'random'",
    ):
        load_config(overrides=["graph.kind=random", "graph.measure=principal-angles"])
    learned = load_config(overrides=["graph.measure=principal-angles"])
    assert with_overrides(learned, ["graph.kind=random"]).graph.measure == "cosine"


@pytest.mark.parametrize("strength", ["algorithm.coupling=0", "algorithm.server_step=0"])
def test_a_safeguard_needs_something_to_decline(strength: str) -> None:
    with pytest.raises(ConfigError, match="nobody is pulled"):
        load_config(
            overrides=[
                "algorithm.name=mira",
                "algorithm.safeguard=true",
                "data.validation_fraction=0.1",
                strength,
            ]
        )


def test_slopes_along_random_directions_are_clipped_only_where_that_is_asked_for(
    tmp_path: Path,
) -> None:
    """The dump holds the number, so a run folder says what was done and is read back alike."""
    assert load_config().local.max_grad_norm == 1.0
    path = write(tmp_path, '[local]\noptimizer = "zeroth-order"\n')
    free = load_config(path)
    asked = load_config(path, overrides=["local.max_grad_norm=0.5"])
    assert (free.local.max_grad_norm, asked.local.max_grad_norm) == (0.0, 0.5)
    for config in (free, asked):
        assert f"\nmax_grad_norm = {config.local.max_grad_norm}\n" in dump_config(config)
        assert load_config(write(tmp_path, dump_config(config))) == config


def test_a_limit_of_gradients_does_not_become_one_of_slopes_nor_the_other_way_round(
    tmp_path: Path,
) -> None:
    slopes, gradients = "local.optimizer=zeroth-order", "local.optimizer=sgd"
    dumped = write(tmp_path, dump_config(load_config(overrides=[slopes])))
    assert load_config(dumped, overrides=[gradients]).local.max_grad_norm == 1.0
    assert with_overrides(load_config(overrides=[slopes]), [gradients]).local.max_grad_norm == 1.0
    assert load_config(preset="fedit-ni", overrides=[gradients]).local.max_grad_norm == 5.0
    assert load_config(preset="fedit-ni", overrides=[slopes]).local.max_grad_norm == 0.0
    asked = write(tmp_path, '[local]\noptimizer = "zeroth-order"\nmax_grad_norm = 0.5\n')
    assert load_config(asked, overrides=[slopes, "local.steps=2"]).local.max_grad_norm == 0.5


def test_a_wrong_optimizer_is_the_only_problem_although_a_default_depends_on_it() -> None:
    (problem,) = problems("local.optimizer=sgdd")
    assert problem.startswith('local.optimizer = "sgdd": must be one of')


def test_a_safeguard_compares_whole_messages() -> None:
    with pytest.raises(
        ConfigError,
        match="engine.wire = 'int8' rounds what travels, but with algorithm.safeguard = true",
    ):
        load_config(
            overrides=[
                "algorithm.safeguard=true",
                "data.validation_fraction=0.1",
                "engine.wire=int8",
            ]
        )


def test_other_averages_are_refused_of_methods_that_make_none() -> None:
    (problem,) = problems("algorithm.name=flexlora", "server.combine=median")
    assert "algorithm.name = 'flexlora' does not make" in problem
    assert "'fedavg'" in problem
    for name in ("fedavg", "fedprox", "fedopt", "ditto", "fedit-finetune", "fedlease"):
        chosen = [f"algorithm.name={name}", "server.combine=trimmed", "server.trim=0.25"]
        assert load_config(overrides=chosen).server.trim == 0.25
    (problem,) = problems("algorithm.name=scaffold", "local.optimizer=sgd", "server.combine=median")
    assert "'scaffold'" in problem
    assert "does not read it" in problems("algorithm.name=fedavg", "server.trim=0.3")[0]


def test_a_class_with_a_combine_of_its_own_makes_no_other_average_unless_it_says_so() -> None:
    class Own(FedAvg):
        def combine(self, state, replies):  # type: ignore[no-untyped-def]
            return super().combine(state, replies)

    class Same(FedAvg):
        pass

    assert (FedAvg.averages, Same.averages, Own.averages) == (True, True, False)


def test_a_least_number_of_neighbours_is_refused_of_methods_that_mix_nobody() -> None:
    (problem,) = problems("algorithm.name=fedavg", "server.least_mixed=2")
    assert "'mira', 'two-level'" in problem
    assert load_config(overrides=["server.least_mixed=2"]).server.least_mixed == 2


def test_the_server_is_written_where_something_is_set() -> None:
    assert "[server]" not in dump_config(Config())
    config = load_config(overrides=["server.norm_bound=4.0"])
    assert "norm_bound = 4.0" in dump_config(config)
