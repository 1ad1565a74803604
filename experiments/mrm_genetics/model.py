"""The networks of masked relation modeling (paper section 3).

Letters: B batch, C channels, N patches, P values of a patch, F features of a genome, S features of a segment, G tokens
of a genome, M kinds of genetics, E width, D width of a decoder, H heads.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.blocks.attention import Relations, TransformerBlock, relations_of
from common.blocks.pos_embed import sincos_position_embedding
from common.blocks.vit import VisionTransformer, init_xavier_weights
from common.maskers.relation import TieRule
from common.runtime.precision import at_least_float32
from common.types import MaskOutput

Pool = Literal["mean", "cls"]
CrossParameters = Literal["shared", "dedicated"]


class SegmentLinear(nn.Module):
    """A linear layer of its own for every segment, with LeCun's normal initialisation.

    Args:
        segments: Number of segments.
        in_features: Values of a segment.
        out_features: Values it is mapped to.
    """

    def __init__(self, segments: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(segments, in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(segments, out_features))
        nn.init.normal_(self.weight, std=in_features**-0.5)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay must leave alone."""
        return {"bias"}

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, segments, in_features)`` to ``(B, segments, out_features)``."""
        return (x.transpose(0, 1) @ self.weight + self.bias[:, None]).transpose(0, 1)


class Segments(NamedTuple):
    """How the features of one kind of genetics are cut into tokens.

    Attributes:
        features: How many there are.
        tokens: Into how many segments they are cut.
        size: Features of a segment; the last is padded with zeros.
    """

    features: int
    tokens: int
    size: int


def cut_segments(features: int, wanted: int) -> Segments:
    """Cut features into about ``wanted`` equal segments; never into one without a feature."""
    size = math.ceil(features / max(min(wanted, features), 1))
    return Segments(features, math.ceil(features / size), size)


class SegmentTokenizer(nn.Module):
    """Self-normalising tokens of genome segments (section 3.1; a segment in genome order is a token).

    Each segment has a linear layer of its own, then SELU, alpha dropout, a linear layer that all segments of a kind
    share, and SELU; positions and a vector of the kind are added.

    Args:
        features: Features of each kind of genetics, by name, in the order in which they come.
        segments: Tokens of each kind; kinds that are not named get ``other_segments``. One is a token per kind.
        dim: E.
        dropout: Rate of alpha dropout.
        other_segments: Tokens of a kind that ``segments`` does not name.
    """

    def __init__(
        self,
        features: Mapping[str, int],
        segments: Mapping[str, int],
        dim: int,
        dropout: float = 0.1,
        other_segments: int = 16,
    ) -> None:
        super().__init__()
        self.cuts = {name: cut_segments(count, segments.get(name, other_segments)) for name, count in features.items()}
        self.first = nn.ModuleDict({name: SegmentLinear(cut.tokens, cut.size, dim) for name, cut in self.cuts.items()})
        self.second = nn.ModuleDict({name: nn.Linear(dim, dim) for name in self.cuts})
        self.dropout = nn.AlphaDropout(dropout)
        for name, parameter in self.second.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=dim**-0.5)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.num_tokens, dim))
        self.kind_embed = nn.Parameter(0.02 * torch.randn(len(self.cuts), dim))

    @property
    def num_tokens(self) -> int:
        """G."""
        return sum(cut.tokens for cut in self.cuts.values())

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay must leave alone."""
        return {"pos_embed", "kind_embed"}

    def split(self, values: Tensor) -> list[Tensor]:
        """Cut ``(B, F)`` into the padded segments of each kind ``(B, tokens, S)``."""
        parts = values.split([cut.features for cut in self.cuts.values()], dim=1)
        return [
            F.pad(part, (0, cut.tokens * cut.size - cut.features)).unflatten(1, (cut.tokens, cut.size))
            for part, cut in zip(parts, self.cuts.values(), strict=True)
        ]

    def real_tokens(self, present: Tensor) -> Tensor:
        """Spread which kinds a sample has, bool ``(B, M)``, over the tokens ``(B, G)``."""
        counts = torch.tensor([cut.tokens for cut in self.cuts.values()], device=present.device)
        return present.repeat_interleave(counts, dim=1, output_size=self.num_tokens)

    def forward(self, values: Tensor) -> Tensor:
        """Embed ``(B, F)`` to tokens ``(B, G, E)``."""
        tokens = []
        for index, (name, part) in enumerate(zip(self.cuts, self.split(values), strict=True)):
            hidden = self.dropout(F.selu(self.first[name](part)))
            tokens.append(F.selu(self.second[name](hidden)) + self.kind_embed[index])
        return torch.cat(tokens, dim=1) + self.pos_embed


class GenomeEncoder(nn.Module):
    """Segment tokens and self-attention among them (section 3.1).

    Args:
        features: Features of each kind of genetics, by name.
        dim: E, that of the image encoder.
        num_heads: H, that of the image encoder.
        segments: Tokens of each kind.
        depth: Blocks, at least 2.
        mlp_ratio: Width of the MLP over E.
        dropout: Rate of alpha dropout in the tokens.
        norm_eps: Added to the variance in LayerNorm.

    Raises:
        ValueError: fewer than two blocks, where relations are masked.
    """

    def __init__(
        self,
        features: Mapping[str, int],
        dim: int,
        num_heads: int,
        segments: Mapping[str, int] | None = None,
        depth: int = 4,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if depth < 2:
            raise ValueError(f"Relations are masked in two blocks, so the genome needs at least 2, got {depth}.")
        chosen = {"snp": 64, "pgs": 16, "burden": 64} if segments is None else segments
        self.tokens = SegmentTokenizer(features, chosen, dim, dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, num_heads, mlp_ratio, qkv_bias=True, norm_eps=norm_eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, norm_eps)
        self.blocks.apply(init_xavier_weights)


class FusedDecoder(nn.Module):
    """Reconstructs one modality from its masked features and the intact ones of the other (Eq. 7).

    Tokens of both are joined along the token axis; the last block and the prediction are computed for the
    reconstructed modality's tokens alone.

    Args:
        embed_dim: E.
        grid_size: Patches of the image along each axis.
        num_prefix_tokens: Tokens before the image's patches; they have no position.
        genome_tokens: G; 0 without genetics.
        reconstructs: Whose tokens are returned.
        mask_token: Whether hidden patches get a learned token, for masked autoencoding.
        decoder_dim: D.
        depth: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Width of the MLP over D.
        norm_eps: Added to the variance in LayerNorm.
    """

    def __init__(
        self,
        embed_dim: int,
        grid_size: Sequence[int],
        num_prefix_tokens: int,
        genome_tokens: int,
        reconstructs: Literal["image", "genome"],
        mask_token: bool,
        decoder_dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.dim, self.reconstructs = decoder_dim, reconstructs
        self.num_prefix_tokens = num_prefix_tokens
        self.num_image = num_prefix_tokens + math.prod(grid_size)
        self.embed = nn.Linear(embed_dim, decoder_dim)
        table = sincos_position_embedding(grid_size, decoder_dim)
        self.pos_embed = nn.Parameter(F.pad(table, (0, 0, num_prefix_tokens, 0)), requires_grad=False)
        self.genome_pos = nn.Parameter(0.02 * torch.randn(1, genome_tokens, decoder_dim)) if genome_tokens else None
        self.kind_embed = nn.Parameter(0.02 * torch.randn(2, decoder_dim)) if genome_tokens else None
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_dim)) if mask_token else None
        self.blocks = nn.ModuleList(
            TransformerBlock(decoder_dim, num_heads, mlp_ratio, qkv_bias=True, norm_eps=norm_eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(decoder_dim, norm_eps)
        self.apply(init_xavier_weights)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay must leave alone."""
        names = {"pos_embed", "genome_pos", "kind_embed", "mask_token"}
        return {name for name in names if getattr(self, name) is not None}

    def _image(self, tokens: Tensor, mask: MaskOutput | None) -> Tensor:
        """Embed the image's tokens at their places; hidden ones get the mask token."""
        x = self.embed(tokens)
        if self.mask_token is not None and mask is not None and mask.ids_restore is not None:
            prefix, visible = x.tensor_split([self.num_prefix_tokens], dim=1)
            hidden = self.mask_token.expand(len(x), mask.ids_restore.shape[1] - visible.shape[1], -1)
            joined = torch.cat([visible, hidden.to(x.dtype)], dim=1)
            joined = joined.gather(1, mask.ids_restore[..., None].expand(-1, -1, self.dim))
            x = torch.cat([prefix, joined], dim=1)
        return x + self.pos_embed

    def forward(
        self, image: Tensor, genome: Tensor | None = None, real: Tensor | None = None, mask: MaskOutput | None = None
    ) -> Tensor:
        """Decode.

        Args:
            image: ``(B, prefix + N, E)``; only the visible patches where ``mask`` hides some.
            genome: ``(B, G, E)``; None without genetics.
            real: bool ``(B, G)``, which of the genome's tokens are there; None: all.
            mask: Which patches were hidden.

        Returns:
            Normalised tokens of the reconstructed modality: ``(B, N, D)``, or ``(B, G, D)``.
        """
        x = self._image(image, mask)
        own, keys = slice(self.num_prefix_tokens, self.num_image), None
        if genome is not None:
            assert self.kind_embed is not None
            assert self.genome_pos is not None
            x = torch.cat([x + self.kind_embed[0], self.embed(genome) + self.genome_pos + self.kind_embed[1]], dim=1)
            if real is not None:
                keys = F.pad(real, (self.num_image, 0), value=True)
            if self.reconstructs == "genome":
                own = slice(self.num_image, None)
        *blocks, last = self.blocks
        for block in blocks:
            x = block.transform(x, keys)  # type: ignore[operator]
        return self.norm(last.transform(x, keys, queries=own))  # type: ignore[operator]


class GenomeHeads(nn.Module):
    """A linear layer from each token to the features of its segment.

    Args:
        cuts: How the features are cut.
        dim: D.
    """

    def __init__(self, cuts: Mapping[str, Segments], dim: int) -> None:
        super().__init__()
        self.cuts = dict(cuts)
        self.layers = nn.ModuleDict({name: SegmentLinear(cut.tokens, dim, cut.size) for name, cut in cuts.items()})

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict ``(B, F)`` from ``(B, G, D)``."""
        parts = tokens.split([cut.tokens for cut in self.cuts.values()], dim=1)
        return torch.cat(
            [
                self.layers[name](part).flatten(1)[:, : cut.features]
                for (name, cut), part in zip(self.cuts.items(), parts, strict=True)
            ],
            dim=1,
        )


class Genetics(NamedTuple):
    """The genetics of a batch.

    Attributes:
        values: ``(B, F)``, standardised.
        present: bool ``(B, M)``, which kinds a sample has; None: every sample has all.
    """

    values: Tensor
    present: Tensor | None


class Tokens(NamedTuple):
    """Tokens of one pass, ``(B, prefix + N, E)`` and ``(B, G, E)``, or None without genetics."""

    image: Tensor
    genome: Tensor | None


class Stream(NamedTuple):
    """Tokens of both passes; None where the intact one is not run."""

    intact: Tokens | None
    masked: Tokens

    def joined(self) -> Tokens:
        """Return both passes as one batch, the intact one first: larger matrix products, the same result."""
        assert self.intact is not None
        genome = None
        if self.intact.genome is not None and self.masked.genome is not None:
            genome = torch.cat([self.intact.genome, self.masked.genome])
        return Tokens(torch.cat([self.intact.image, self.masked.image]), genome)

    @classmethod
    def parted(cls, tokens: Tokens) -> "Stream":
        """Undo :meth:`joined`."""
        image, genome = tokens.image.chunk(2), (None, None) if tokens.genome is None else tokens.genome.chunk(2)
        return cls(Tokens(image[0], genome[0]), Tokens(image[1], genome[1]))


class BlockPair(NamedTuple):
    """Blocks that are run one after the other, one per modality; None where a modality has none left."""

    image: TransformerBlock | None
    genome: TransformerBlock | None


class GenomeKeys(NamedTuple):
    """Which tokens of a genome can be attended to, bool ``(B, G)``; None: all.

    Attributes:
        real: those that are there.
        safe: the same, but True throughout for a sample that has none: it would have no key at all, and the output
            for its genome is not used.
    """

    real: Tensor | None = None
    safe: Tensor | None = None

    def twice(self) -> "GenomeKeys":
        """Return the keys of two passes in one batch."""
        return GenomeKeys(*(None if part is None else torch.cat([part, part]) for part in self))


class RelationOutput(NamedTuple):
    """The network's output.

    Attributes:
        image: ``(B, N, P)``, the predicted patches; None where nothing is reconstructed.
        genome: ``(B, F)``, the predicted features; None without genetics.
        pooled: Image and genome of the intact pass, then of the masked one, each ``(B, E)`` or None.
    """

    image: Tensor | None
    genome: Tensor | None
    pooled: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class RelationConfig:
    """How relations are masked.

    Args:
        cross_params: ``"shared"`` has no weights for relations between modalities; ``"dedicated"`` puts a block of its
            own for each modality between the first and the second, in the masked pass alone.
        tie_rule: ``"threshold"`` (Eq. 4) or ``"rank"``; see :func:`common.maskers.relation.mask_top_relations`.
        masked_residual: Whether the masked attention is added to the stream, as anywhere else, or replaces it.
        renormalize: Whether rows are scaled to sum to 1 after masking.
    """

    cross_params: CrossParameters = "shared"
    tie_rule: TieRule = "threshold"
    masked_residual: bool = True
    renormalize: bool = False


class RelationNetwork(nn.Module):
    """One encoder per modality, run intact and with relations masked in the first two blocks (sections 3.2 and 3.3).

    In the masked pass the first block masks relations within a modality, the second those to the other modality: with
    its own queries, output projection and MLP, and the other's keys and values. Without genetics the second masks
    relations within the image again (section 4.6). All later blocks are ordinary.

    Args:
        encoder: Of the image.
        genome: Of the genome; None for images alone.
        decoder: Of the image; None where nothing is reconstructed.
        genome_decoder: Of the genome; None likewise.
        tau_image: Share of relations removed from the image's rows, both its own and those to the genome.
        tau_genome: The same for the genome's rows.
        relations: How relations are masked.
        pool: How tokens become the vector that samples are compared by.

    Raises:
        ValueError: the image encoder has fewer than two blocks, or no class token to pool.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        genome: GenomeEncoder | None,
        decoder: FusedDecoder | None,
        genome_decoder: FusedDecoder | None,
        tau_image: float = 0.75,
        tau_genome: float = 0.5,
        relations: RelationConfig = RelationConfig(),
        pool: Pool = "mean",
    ) -> None:
        super().__init__()
        if len(encoder.blocks) < 2:
            raise ValueError(f"Relations are masked in two blocks, so depth must be at least 2, "
                             f"got {len(encoder.blocks)}.")  # fmt: skip
        if pool == "cls" and not encoder.num_prefix_tokens:
            raise ValueError("match_pool cls needs an encoder with a class token.")
        self.encoder, self.genome = encoder, genome
        self.decoder, self.genome_decoder = decoder, genome_decoder
        self.tau_image, self.tau_genome, self.tie_rule = tau_image, tau_genome, relations.tie_rule
        self.masked_residual, self.renormalize = relations.masked_residual, relations.renormalize
        self.pool = pool
        encoder.apply(init_xavier_weights)
        width = encoder.embed_dim
        patch_values = math.prod(encoder.patch_embed.patch_size) * encoder.patch_embed.in_channels
        self.to_pixels = nn.Linear(decoder.dim, patch_values) if decoder is not None else None
        if self.to_pixels is not None:
            init_xavier_weights(self.to_pixels)
        self.to_genome = None
        if genome is not None and genome_decoder is not None:
            self.to_genome = GenomeHeads(genome.tokens.cuts, genome_decoder.dim)
        self.cross: nn.ModuleDict | None = None
        if genome is not None and relations.cross_params == "dedicated":
            config: dict[str, Any] = encoder.config
            names = ("num_heads", "mlp_ratio", "norm_eps")
            blocks = {
                name: TransformerBlock(width, qkv_bias=True, **{key: config[key] for key in names})
                for name in ("image", "genome")
            }
            self.cross = nn.ModuleDict(blocks)
            self.cross.apply(init_xavier_weights)

    def forward(
        self,
        image: Tensor,
        genetics: Genetics | None = None,
        mask: MaskOutput | None = None,
        intact: bool = True,
        record: dict[str, Relations] | None = None,
    ) -> RelationOutput:
        """Run both passes and reconstruct.

        Args:
            image: ``(B, C, H, W)``.
            genetics: None for images alone.
            mask: Hides patches at the input, as masked autoencoding does; None hides nothing.
            intact: Whether the intact pass is needed; with genetics and a reconstruction it always is.
            record: Takes the masked relations by name, for diagnostics.
        """
        encoder, keys = self.encoder, GenomeKeys()
        patches = encoder.patch_embed.patchify(image)
        tokens = Tokens(encoder.embed(patches, mask.ids_keep if mask is not None else None), None)
        if genetics is not None:
            assert self.genome is not None
            tokens = tokens._replace(genome=self.genome.tokens(genetics.values))
            if genetics.present is not None:
                real = self.genome.tokens.real_tokens(genetics.present)
                keys = GenomeKeys(real, real | ~real.any(1, keepdim=True))
        intact = intact or (genetics is not None and self.decoder is not None)
        stream = self.passes(tokens, keys, intact, record)
        pooled = (*self._pooled(stream.intact, keys.safe), *self._pooled(stream.masked, keys.safe))
        return RelationOutput(*self._decoded(stream, keys.real, mask), pooled)

    def _decoded(
        self, stream: Stream, real: Tensor | None, mask: MaskOutput | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Reconstruct each modality from its masked tokens and the intact ones of the other (Eq. 7)."""
        whole, hidden = stream
        if self.decoder is None:
            return None, None
        assert self.to_pixels is not None
        pred = self.to_pixels(self.decoder(hidden.image, whole.genome if whole else None, real, mask))
        if self.to_genome is None or self.genome_decoder is None or whole is None:
            return pred, None
        return pred, self.to_genome(self.genome_decoder(whole.image, hidden.genome, real, mask))

    def _pooled(self, tokens: Tokens | None, real: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the vectors of image and genome, float32 or float64."""
        if tokens is None:
            return None, None
        prefix = self.encoder.num_prefix_tokens
        image = at_least_float32(tokens.image)
        image = image[:, 0] if self.pool == "cls" else image[:, prefix:].mean(1)
        if tokens.genome is None:
            return image, None
        genome = at_least_float32(tokens.genome)
        if real is None:
            return image, genome.mean(1)
        weight = real[..., None].to(genome.dtype)
        return image, (genome * weight).sum(1) / weight.sum(1)

    def block_pairs(self) -> list[BlockPair]:
        """Return the blocks of both encoders in the order in which they are run."""
        blocks = cast(list[TransformerBlock], list(self.encoder.blocks))
        others = cast(list[TransformerBlock], list(self.genome.blocks) if self.genome is not None else [])
        return [BlockPair(*pair) for pair in zip_longest(blocks, others)]

    def passes(
        self, tokens: Tokens, keys: GenomeKeys, intact: bool, record: dict[str, Relations] | None = None
    ) -> Stream:
        """Run embedded tokens through the encoders, intact and masked, and normalise them.

        Args:
            tokens: Embedded tokens.
            keys: Which of the genome's tokens are there.
            intact: Whether the intact pass is run.
            record: Takes the masked relations by name.
        """
        first, *rest = self.block_pairs()
        stream = self._within(first, tokens, keys, intact, record)
        if self.cross is not None:
            second = BlockPair(*(cast(TransformerBlock, self.cross[name]) for name in ("image", "genome")))
            whole = stream.intact
        else:
            second, *rest = rest
            whole = None if stream.intact is None else self._ordinary([second], stream.intact, keys)
        stream = Stream(whole, self._across(second, stream.masked, keys, record))
        if stream.intact is None:
            return Stream(None, self._finished(rest, stream.masked, keys))
        return Stream.parted(self._finished(rest, stream.joined(), keys.twice()))

    def _within(
        self, pair: BlockPair, tokens: Tokens, keys: GenomeKeys, intact: bool, record: dict[str, Relations] | None
    ) -> Stream:
        """Run a block of each modality intact and with the relations within it masked (Eq. 5)."""
        assert pair.image is not None
        image, image_masked = self._self_block("image_self", pair.image, tokens.image, None, intact, record)
        genome, genome_masked = None, None
        if tokens.genome is not None:
            assert pair.genome is not None
            own = self._self_block("genome_self", pair.genome, tokens.genome, keys.safe, intact, record)
            genome, genome_masked = own
        return Stream(Tokens(image, genome) if intact else None, Tokens(image_masked, genome_masked))

    def _self_block(
        self,
        name: str,
        block: TransformerBlock,
        x: Tensor,
        real: Tensor | None,
        intact: bool,
        record: dict[str, Relations] | None,
    ) -> tuple[Tensor, Tensor]:
        """Run a block intact and masked on the same tokens; both share queries, keys, values and the softmax."""
        q, k, v = block.attn.heads(block.norm1(x))
        relations = self._relations(name, q, k, real, record)
        masked = self._finish(block, x, relations.apply(v, self.renormalize))
        return (block.finish(x, relations.weights.to(v.dtype) @ v) if intact else x), masked

    def _across(self, pair: BlockPair, x: Tokens, keys: GenomeKeys, record: dict[str, Relations] | None) -> Tokens:
        """Run a block of each modality on the other's keys and values, both from the same tokens (Eq. 6).

        Without genetics the image's relations to itself are masked once more (section 4.6).
        """
        assert pair.image is not None
        q, k, v = pair.image.attn.heads(pair.image.norm1(x.image))
        if x.genome is None:
            again = self._relations("image_self_second", q, k, None, record).apply(v, self.renormalize)
            return Tokens(self._finish(pair.image, x.image, again), None)
        assert pair.genome is not None
        q_genome, k_genome, v_genome = pair.genome.attn.heads(pair.genome.norm1(x.genome))
        image = self._relations("image_cross", q, k_genome, keys.safe, record).apply(v_genome, self.renormalize)
        if keys.real is not None:
            # Without any genetics an image has relations to itself alone, as in the mode for images.
            alone = self._relations("image_alone", q, k, None, None).apply(v, self.renormalize)
            image = torch.where(keys.real.any(1)[:, None, None, None], image, alone)
        genome = self._relations("genome_cross", q_genome, k, None, record).apply(v, self.renormalize)
        return Tokens(self._finish(pair.image, x.image, image), self._finish(pair.genome, x.genome, genome))

    def _relations(
        self, name: str, q: Tensor, k: Tensor, real: Tensor | None, record: dict[str, Relations] | None
    ) -> Relations:
        """Return masked relations; rows are those of the modality that the name begins with."""
        ratio = self.tau_image if name.startswith("image") else self.tau_genome
        relations = relations_of(q, k, ratio, real, self.tie_rule)
        if record is not None:
            record[name] = relations
        return relations

    def _finish(self, block: TransformerBlock, x: Tensor, attended: Tensor) -> Tensor:
        return block.finish(x if self.masked_residual else torch.zeros_like(x), attended)

    def _ordinary(self, pairs: Sequence[BlockPair], x: Tokens, keys: GenomeKeys) -> Tokens:
        """Run blocks as they are."""
        image, genome = x
        for pair in pairs:
            if pair.image is not None:
                image = self.encoder.run_block(pair.image, image)
            if pair.genome is not None and genome is not None:
                genome = pair.genome.transform(genome, keys.safe)
        return Tokens(image, genome)

    def _finished(self, pairs: Sequence[BlockPair], x: Tokens, keys: GenomeKeys) -> Tokens:
        """Run the last blocks and the final norms."""
        image, genome = self._ordinary(pairs, x, keys)
        if genome is not None:
            assert self.genome is not None
            genome = self.genome.norm(genome)
        return Tokens(self.encoder.norm(image), genome)
