"""The two towers, CLIP's vision transformer and RoBERTa, built from parts of transformers.

Letters: B batch, N patches, K visible patches, T tokens, W width of a tower.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, RobertaConfig, RobertaModel

from common.blocks.patch_embed import grid_of, patchify
from common.blocks.pos_embed import resize_position_embedding
from common.errors import CheckpointError, UserError

#: How the keys of learned image positions end, here and in every copy of a tower, such as a teacher.
POSITIONS = "embeddings.position_embedding.weight"


def resized_positions(table: Tensor, count: int) -> Tensor:
    """Resample learned positions ``(1 + N_old, W)`` to ``count`` = 1 + N: bicubic, the class token's copied.

    Raises:
        CheckpointError: either grid is not square.
    """
    if len(table) == count:
        return table
    old, new = (math.isqrt(number - 1) for number in (len(table), count))
    if old * old + 1 != len(table) or new * new + 1 != count:
        raise CheckpointError(f"Positions of {len(table) - 1} patches cannot be resampled to {count - 1}: no squares.")
    patches = resize_position_embedding(table[None, 1:], (old, old), (new, new))[0]
    return torch.cat([table[:1], patches])


def _side(image_size: Any, patch_size: int) -> int:
    """Return the side of a square image."""
    height, width = image_size
    if height != width:
        raise ValueError(f"CLIP's vision transformer takes square images, got image_size {[height, width]}.")
    if height % patch_size or height < patch_size:
        below = max(height // patch_size * patch_size, patch_size)
        raise ValueError(
            f"image_size {height} is not a multiple of patch_size {patch_size}: use {below} or {below + patch_size}."
        )
    return int(height)


@dataclass(frozen=True)
class TowerConfig:
    """The size of a tower.

    Args:
        width: W.
        depth: Its layers.
        heads: Its attention heads.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12


class VisionTower(nn.Module):
    """CLIP's vision transformer: class token, learned positions, norms before and after all layers (on every token).

    Args:
        image_size: Height and width.
        patch_size: Side of a patch.
        width: W.
        depth: Layers.
        num_heads: Attention heads.
    """

    def __init__(self, image_size: Any, patch_size: int, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=num_heads,
            image_size=_side(image_size, patch_size),
            patch_size=patch_size,
        )
        config._attn_implementation = "sdpa"
        self.patch_size = patch_size
        self.grid_size = grid_of(image_size, (patch_size, patch_size))
        self.clip = CLIPVisionModel(config)

    def forward(self, image: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Encode an image, or the patches that are kept of it.

        Args:
            image: ``(B, 3, H, W)``, standardised.
            ids_keep: long ``(B, K)``; None keeps all.

        Returns:
            ``(B, 1 + N, W)`` or ``(B, 1 + K, W)``, the class token first.
        """
        embeddings = self.clip.embeddings
        patches = patchify(image, (self.patch_size, self.patch_size))
        positions = embeddings.position_embedding.weight
        where = positions[1:].expand(len(image), -1, -1)
        if ids_keep is not None:
            patches = patches.gather(1, ids_keep[..., None].expand(-1, -1, patches.shape[2]))
            where = where.gather(1, ids_keep[..., None].expand(-1, -1, where.shape[2]))
        # A Linear over flattened patches is the convolution, without the patches that are hidden.
        tokens = nn.functional.linear(patches, embeddings.patch_embedding.weight.flatten(1)) + where
        first = (embeddings.class_embedding + positions[0]).expand(len(image), 1, -1)
        x = self.clip.pre_layrnorm(torch.cat([first.to(tokens.dtype), tokens], dim=1))
        for layer in self.clip.encoder.layers:
            x = layer(x, None)
        return self.clip.post_layernorm(x)


class TextTower(nn.Module):
    """RoBERTa without its pooler.

    Args:
        vocab_size: Tokens.
        pad_id: The padding token; positions are counted from the one after it.
        width: W.
        depth: Layers.
        num_heads: Attention heads.
        max_positions: Rows of the table of positions.
        dropout: Rate.
    """

    def __init__(
        self, vocab_size: int, pad_id: int, width: int, depth: int, num_heads: int, max_positions: int, dropout: float
    ) -> None:
        super().__init__()
        config = RobertaConfig(
            vocab_size=vocab_size,
            pad_token_id=pad_id,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=num_heads,
            intermediate_size=4 * width,
            max_position_embeddings=max_positions,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        config._attn_implementation = "sdpa"
        self.roberta = RobertaModel(config, add_pooling_layer=False)

    @property
    def longest(self) -> int:
        """Tokens of the longest text that there are positions for."""
        config = self.roberta.config
        return int(config.max_position_embeddings - (config.pad_token_id or 0) - 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode tokens ``(B, T)`` to ``(B, T, W)``; ``attention_mask`` 0 = padding."""
        embedded = self.roberta.embeddings(input_ids=input_ids)
        keys = attention_mask.bool()[:, None, None, :]
        return self.roberta.encoder(embedded, attention_mask=keys).last_hidden_state


def _from_pretrained(kind: Any, source: str) -> Any:
    """Load a model of transformers from a folder or by its name."""
    extra = {"add_pooling_layer": False} if kind is RobertaModel else {}
    try:
        return kind.from_pretrained(source, local_files_only=Path(source).is_dir(), **extra)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{source} holds no weights of {kind.__name__} ({reason}): give a folder with config.json and weights, "
            f"or a name that this machine can download."
        ) from error


def _need_same(source: str, theirs: Any, ours: Any, names: Mapping[str, str]) -> None:
    """Refuse weights of another architecture, naming the first setting that differs."""
    for name, setting in names.items():
        wanted, found = getattr(ours, name), getattr(theirs, name)
        if wanted != found:
            raise UserError(f"{source} has {name} {found}, the configuration {wanted}: set {setting}.")


def load_vision(tower: VisionTower, source: str) -> None:
    """Take weights of CLIP's vision transformer from a local folder or a name of the hub.

    Of more layers these are the first; positions are resampled once.

    Raises:
        CheckpointError: there are none.
        UserError: they are of another architecture.
    """
    found = _from_pretrained(CLIPVisionModel, source)
    found = getattr(found, "vision_model", found)
    ours = tower.clip.config
    names = {
        "hidden_size": "model.encoder.vision.width",
        "patch_size": "model.encoder.patch_size",
        "num_attention_heads": "model.encoder.vision.heads",
        "intermediate_size": "model.encoder.vision.width",
    }
    _need_same(source, found.config, ours, names)
    if found.config.num_hidden_layers < ours.num_hidden_layers:
        raise UserError(f"{source} has {found.config.num_hidden_layers} layers, fewer than model.encoder.vision.depth "
                        f"{ours.num_hidden_layers}.")  # fmt: skip
    wanted = tower.clip.state_dict()
    state = {key: value for key, value in found.state_dict().items() if key in wanted}
    state[POSITIONS] = resized_positions(state[POSITIONS], len(wanted[POSITIONS]))
    tower.clip.load_state_dict(state)


def load_text(tower: TextTower, source: str) -> None:
    """Take weights of RoBERTa from a local folder or a name of the hub.

    Raises:
        CheckpointError: there are none.
        UserError: they are of another architecture or vocabulary.
    """
    found = _from_pretrained(RobertaModel, source)
    ours = tower.roberta.config
    if found.config.vocab_size != ours.vocab_size or found.config.pad_token_id != ours.pad_token_id:
        raise UserError(
            f"The text encoder {source} has {found.config.vocab_size} tokens, {found.config.pad_token_id} as padding; "
            f"the tokenizer {ours.vocab_size}, {ours.pad_token_id} for padding: set data.text.tokenizer to its own."
        )
    names = {"hidden_size": "model.encoder.text.width", "num_hidden_layers": "model.encoder.text.depth",
             "num_attention_heads": "model.encoder.text.heads", "intermediate_size": "model.encoder.text.width",
             "max_position_embeddings": "model.encoder.max_positions"}  # fmt: skip
    _need_same(source, found.config, ours, names)
    kinds = "embeddings.token_type_embeddings.weight"  # there is one kind of text here
    tower.roberta.load_state_dict({**found.state_dict(), kinds: found.state_dict()[kinds][:1]})
