"""A small adapter beside a base that never moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zolightning.spaces.dense import DenseSpace
from zolightning.spaces.wrapping import linear_maps, one_line, require_peft, wrap

_MASK = "zolightning_mask"  # under which the mask passes through peft's forward
_INIT = {"kaiming": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}


class AdapterSpace(DenseSpace):
    r"""The parameters of a peft adapter; the base model, quantised or not, is read-only.

    ``lora`` adds :math:`\frac{\alpha}{r} B A x` to linear maps, with :math:`B = 0` at the start. ``prefix`` puts learned keys and
    values in front of every layer's own; they start as those of random tokens. The adapter is float32. Its initial values are a pure
    function of ``seed``. :attr:`model` is a peft model around the base, so a checkpoint holds what moves under peft's names. For a
    fixed ``A`` see :class:`~zolightning.LowRankSpace`.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        kind: ``lora`` or ``prefix``.
        rank: Rank ``r`` of LoRA.
        alpha: Factor of LoRA.
        targets: Shell patterns over the names of linear maps that get LoRA. Empty: peft's choice for the architecture (often queries
            and values).
        init: How LoRA's ``A`` starts: ``kaiming`` (uniform), ``gaussian`` or ``orthogonal``.
        tokens: Length of the prefix.
        seed: Seed of the initial values.

    Raises:
        ValueError: peft is missing, an argument is out of range, a pattern matches nothing, or peft does not know the architecture.

    Example:
        >>> space = AdapterSpace(load_model("demo", quantization="nf4"), rank=4, targets=["*q_proj", "*v_proj"])  # doctest: +SKIP

    References:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
        Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", ACL 2021.
        Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023 (both, without backward passes).
    """

    def __init__(
        self,
        model: nn.Module,
        kind: Literal["lora", "prefix"] = "lora",
        rank: int = 8,
        alpha: float = 16.0,
        targets: Sequence[str] = (),
        init: Literal["kaiming", "gaussian", "orthogonal"] = "kaiming",
        tokens: int = 5,
        seed: int = 0,
    ) -> None:
        for name, value in (("rank", rank), ("tokens", tokens)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name, choice, known in (("kind", kind, ("lora", "prefix")), ("init", init, tuple(_INIT))):
            if choice not in known:
                raise ValueError(f"{name}={choice!r} must be one of {', '.join(known)}")
        peft = require_peft("AdapterSpace")
        chosen = linear_maps(model, targets)
        with one_line(kind, model):
            if kind == "lora":
                config = peft.LoraConfig(
                    task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules=chosen, init_lora_weights=_INIT[init]
                )
                wrapped, own = wrap(model, config, seed)
            else:
                values = _keys_and_values(model, tokens, seed)
                wrapped, own = wrap(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens), seed)
                wrapped.prompt_encoder["default"].embedding.weight.data.copy_(values)
                wrapped.register_forward_pre_hook(_without_positions, with_kwargs=True)
                model.register_forward_pre_hook(_with_positions, with_kwargs=True)
        super().__init__(wrapped, include=own)
        self._settings = {"alpha": alpha} if kind == "lora" else {}

    @property
    def settings(self) -> dict[str, Any]:
        return self._settings  # the same blocks mean something else behind another factor


@torch.no_grad()
def _keys_and_values(model: Any, tokens: int, seed: int) -> Tensor:
    """What the layers compute for random tokens, as peft stores it: ``[tokens, layers * 2 * heads * head size]``."""
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator, device="cpu").to(device)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    parts = [part[0] for layer in cache.layers for part in (layer.keys, layer.values)]  # each [heads, tokens, head size]
    return torch.stack(parts).permute(2, 0, 1, 3).flatten(1)


def _without_positions(model: Any, arguments: Any, options: dict[str, Any]) -> Any:
    """The peft model would drop them with a warning, and would fetch the numbers and the mask of its tokens from the host each time."""
    options.pop("position_ids", None)
    mask = options.get("attention_mask")
    off = "forward" in vars(model)  # inside disable_adapter(), where the model below is called past its hooks
    if isinstance(mask, Tensor) and mask.dim() == 2 and options.get("input_ids") is not None and not off:
        options[_MASK] = options.pop("attention_mask")
    device = model.prompt_encoder["default"].embedding.weight.device
    model.prompt_tokens["default"] = model.prompt_tokens["default"].to(device)
    return arguments, options


def _with_positions(model: nn.Module, arguments: Any, options: dict[str, Any]) -> Any:
    """All see the prefix. Count positions from the first real token on: without them a row's loss would depend on its padding."""
    mask, ids = options.pop(_MASK, None), options.get("input_ids")
    if mask is not None:
        prefix = options["past_key_values"].get_seq_length()
        options["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], prefix), mask], dim=1)
    mask = options.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and ids is not None and options.get("position_ids") is None:
        options["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return arguments, options
