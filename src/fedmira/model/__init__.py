"""The only room that knows transformers and peft."""

from fedmira.model.base.borrowed import borrowed, with_padding
from fedmira.model.base.emulator import (
    EMULATOR,
    Emulator,
    in_the_middle,
    kept_layers,
    outer_targets,
    plugged,
    read_emulator,
    write_emulator,
)
from fedmira.model.base.hashing import tokenizer_hash
from fedmira.model.base.ids import check_ids, check_prompt_ids
from fedmira.model.base.loading import load_tokenizer
from fedmira.model.base.memory import free_bytes, most_side_by_side, within_memory
from fedmira.model.base.options import with_engine_options
from fedmira.model.base.rows import Row
from fedmira.model.base.targets import find_targets
from fedmira.model.base.types import BaseModel, TargetModule
from fedmira.model.generation.generate import end_tokens, generate, generate_tokens
from fedmira.model.generation.reference import ReferenceStore
from fedmira.model.kinds.folding import FoldProof, adapter_logits, held_against, write_folded
from fedmira.model.kinds.lora import LoraKind
from fedmira.model.kinds.lora_folders import (
    LoraFolder,
    read_lora_folder,
    write_alike,
    write_lora_folder,
)
from fedmira.model.kinds.peft_files import read_adapter, read_trained, write_adapter
from fedmira.model.kinds.prompts import PromptKind
from fedmira.model.kinds.proof import prove_export
from fedmira.model.kinds.registry import AdapterKind, adapter_kind
from fedmira.model.lora.branch import LoraBranch
from fedmira.model.lora.stack import StackedAdapters, start_adapter
from fedmira.model.packed.attention import ATTENTION
from fedmira.model.packed.load import from_model, load_base
from fedmira.model.packed.passes import response_losses
from fedmira.model.packed.token_budget import (
    choose_token_budget,
    machine_name,
    usual_token_budget,
)
from fedmira.model.training.batches import count_steps
from fedmira.model.training.measure import Choice, Contender, choose_adapters, summed_losses
from fedmira.model.training.private import RowPrivacy
from fedmira.model.training.rates import rate_shares
from fedmira.model.training.steps import train_cohort
from fedmira.model.training.tasks import LocalOutcome, LocalTask

__all__ = [
    "ATTENTION",
    "EMULATOR",
    "Emulator",
    "in_the_middle",
    "kept_layers",
    "outer_targets",
    "plugged",
    "read_emulator",
    "write_emulator",
    "write_folded",
    "held_against",
    "adapter_logits",
    "FoldProof",
    "borrowed",
    "with_padding",
    "AdapterKind",
    "BaseModel",
    "Choice",
    "Contender",
    "LocalOutcome",
    "LocalTask",
    "LoraBranch",
    "LoraFolder",
    "LoraKind",
    "PromptKind",
    "RowPrivacy",
    "ReferenceStore",
    "Row",
    "StackedAdapters",
    "TargetModule",
    "adapter_kind",
    "check_ids",
    "check_prompt_ids",
    "choose_adapters",
    "choose_token_budget",
    "count_steps",
    "end_tokens",
    "find_targets",
    "free_bytes",
    "from_model",
    "generate",
    "generate_tokens",
    "load_base",
    "load_tokenizer",
    "most_side_by_side",
    "prove_export",
    "rate_shares",
    "read_adapter",
    "read_trained",
    "read_lora_folder",
    "response_losses",
    "start_adapter",
    "summed_losses",
    "tokenizer_hash",
    "train_cohort",
    "machine_name",
    "usual_token_budget",
    "with_engine_options",
    "within_memory",
    "write_adapter",
    "write_alike",
    "write_lora_folder",
]
