"""What to run: the settings, their layers, and what is wrong with them in words."""

from fedmira.config.cache import cache_folder, distrusted
from fedmira.config.flat import FlatValue, flattened, unflattened
from fedmira.config.load import (
    dump_config,
    load_config,
    load_data_settings,
    with_algorithm,
    with_method,
    with_overrides,
    with_settings,
)
from fedmira.config.methods import (
    METHODS,
    AbsentMethod,
    MethodSection,
    Need,
    method_class,
    method_names,
)
from fedmira.config.presets import preset_description, preset_names, preset_path
from fedmira.config.problems import refuse_federation
from fedmira.config.schema import (
    AdapterSettings,
    Config,
    DataSettings,
    EngineSettings,
    EvaluationSettings,
    FederationSettings,
    GraphSettings,
    LocalSettings,
    ModelSettings,
    PrivacySettings,
    RankDistribution,
    ResourceType,
    RoundsSettings,
    ServerSettings,
)
from fedmira.config.section import Section, setting

__all__ = [
    "METHODS",
    "AbsentMethod",
    "MethodSection",
    "Need",
    "Section",
    "method_class",
    "method_names",
    "refuse_federation",
    "setting",
    "with_method",
    "AdapterSettings",
    "Config",
    "DataSettings",
    "EngineSettings",
    "EvaluationSettings",
    "FederationSettings",
    "FlatValue",
    "GraphSettings",
    "LocalSettings",
    "ModelSettings",
    "PrivacySettings",
    "RankDistribution",
    "ResourceType",
    "RoundsSettings",
    "ServerSettings",
    "cache_folder",
    "distrusted",
    "dump_config",
    "flattened",
    "load_config",
    "load_data_settings",
    "preset_description",
    "preset_names",
    "preset_path",
    "unflattened",
    "with_algorithm",
    "with_overrides",
    "with_settings",
]
