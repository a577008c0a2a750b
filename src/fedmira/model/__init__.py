"""The only room that knows transformers and peft."""

from fedmira.model.adapter_kinds import AdapterKind, adapter_kind
from fedmira.model.base_model import BaseModel, TargetModule, find_targets, from_model, load_base, load_tokenizer, with_engine_options
from fedmira.model.batches import count_steps
from fedmira.model.generation import generate, generate_tokens
from fedmira.model.local_training import LocalOutcome, LocalTask, train_cohort
from fedmira.model.lora import LoraBranch, StackedAdapters, start_adapter
from fedmira.model.lora_kind import LoraKind
from fedmira.model.loss import response_losses
from fedmira.model.measure import Choice, Contender, choose_adapters, summed_losses
from fedmira.model.memory import most_side_by_side, within_memory
from fedmira.model.packing import Row
from fedmira.model.peft_files import read_adapter, write_adapter
from fedmira.model.prompt_kind import PromptKind
from fedmira.model.token_budget import choose_token_budget, usual_token_budget
from fedmira.model.tokenizer_hash import tokenizer_hash

__all__ = [
    "AdapterKind",
    "BaseModel",
    "Choice",
    "Contender",
    "LocalOutcome",
    "LocalTask",
    "LoraBranch",
    "LoraKind",
    "PromptKind",
    "Row",
    "StackedAdapters",
    "TargetModule",
    "adapter_kind",
    "choose_adapters",
    "choose_token_budget",
    "count_steps",
    "find_targets",
    "from_model",
    "generate",
    "generate_tokens",
    "load_base",
    "load_tokenizer",
    "most_side_by_side",
    "read_adapter",
    "response_losses",
    "start_adapter",
    "summed_losses",
    "tokenizer_hash",
    "train_cohort",
    "usual_token_budget",
    "with_engine_options",
    "within_memory",
    "write_adapter",
]
