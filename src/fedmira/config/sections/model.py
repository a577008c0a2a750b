"""[model]: the frozen base."""

from __future__ import annotations

from typing import Literal

from fedmira.config.section import Section, setting

__all__ = ["ModelSettings"]


class ModelSettings(Section):
    """[model]: the frozen base model."""

    base: str = setting(
        "bundled",
        min_length=1,
        help=(
            '`"bundled"`, a local folder in Hugging Face format (with `config.json` and a '
            "tokenizer), or a hub id, which transformers downloads or takes from its cache. "
            'Code that comes with a model is never run. `"object"` stands for a model that '
            "was given "
            "from Python."
        ),
    )
    sha256: str | None = setting(
        None,
        help=(
            "Of the weights of a model that was given from Python; the run writes it, so that it "
            "knows the model again."
        ),
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto",
        help=(
            'Number type of the frozen base. `"auto"` is float32 on a CPU and bfloat16 on a '
            "CUDA device that has it. Adapters, their gradients and the server's arithmetic do "
            "not follow it: adapters are float32, mixing is done in float64."
        ),
    )
    device: str = setting(
        "auto",
        min_length=1,
        help=(
            '`"auto"` takes CUDA where there is one, else the CPU. Otherwise torch\'s name of a '
            'device: `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`.'
        ),
    )
    quantization: Literal["none", "8bit", "4bit"] = setting(
        "none",
        help=(
            "Stores the base's linear layers in fewer bits through bitsandbytes (4 bits as "
            "NF4): less memory, another (coarser) base. Needs a CUDA device and `pip install "
            "'.[quantized]'` in the checkout; not run on a GPU yet."
        ),
    )
    name: str = setting(
        "",
        help=(
            "The name under which others can have the base, such as `owner/name`: saved adapters "
            "give it as `base_model_name_or_path`. Empty takes the hub id, or `_name_or_path` in "
            "the folder's config.json where that is one, else the folder's absolute path."
        ),
    )
