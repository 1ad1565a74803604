"""The networks of masked record modeling (paper section 3, Fig. 1).

Letters: B batch, N patches, K visible patches, S predicted patches or hidden tokens, P values per target patch, E width
of the encoder, T tokens, R width of the report decoder, V tokens of the vocabulary.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertLMPredictionHead

from common.blocks.decoder import MAEDecoder
from common.blocks.patch_embed import PATCH_EPS, normalise_patches, patchify_channels_last, unpatchify
from common.blocks.pos_embed import sincos_position_embedding
from common.blocks.vit import VisionTransformer, init_xavier_weights
from common.types import ImageTextBatch, MaskOutput

TargetNorm = Literal["patch", "unit", "dataset"]
Pool = Literal["gap", "gmp"]


class ReportDecoder(nn.Module):
    """Fills in the hidden words of a report, given one vector of the image (section 3.1, appendix A.2).

    Args:
        vocab_size: V.
        length: T at most.
        dim: R.
        depth: Post-norm layers of BERT.
        num_heads: Attention heads.
        mlp_dim: Width of the MLP.
        dropout: Rate in embeddings, attention and MLP.
        fusion: ``"visible"`` adds the image's vector to the visible tokens only, as the paper; ``"all"`` to every
            position, as the published code.
        tie_embeddings: Whether output and input share one table; the published code unties them by accident.
        head: ``"transform"`` predicts as BERT does, ``"linear"`` by the output table alone, as appendix A.2.
        positions: ``"learned"`` or fixed ``"sincos"``.
        attend: ``"own"`` lets each position see itself alone, the control of what context is worth.
    """

    def __init__(
        self,
        vocab_size: int,
        length: int = 100,
        dim: int = 384,
        depth: int = 6,
        num_heads: int = 6,
        mlp_dim: int = 1536,
        dropout: float = 0.1,
        fusion: Literal["visible", "all"] = "visible",
        tie_embeddings: bool = True,
        head: Literal["transform", "linear"] = "transform",
        positions: Literal["learned", "sincos"] = "learned",
        attend: Literal["all", "own"] = "all",
    ) -> None:
        super().__init__()
        self.dim, self.length = dim, length
        self.fusion = fusion
        self.attend = attend
        config = BertConfig(
            vocab_size=vocab_size,
            hidden_size=dim,
            num_hidden_layers=depth,
            num_attention_heads=num_heads,
            intermediate_size=mlp_dim,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            max_position_embeddings=length,
        )
        config._attn_implementation = "sdpa"
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = BertLMPredictionHead(config)
        if head == "linear":
            self.head.transform = nn.Identity()
        self.head.bias = self.head.decoder.bias  # one bias; transformers keeps a second name for it
        self.apply(init_xavier_weights)
        embeddings = self.bert.embeddings
        for table in (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings):
            nn.init.normal_(table.weight, std=0.02)
        if tie_embeddings:
            self.head.decoder.weight = embeddings.word_embeddings.weight
        if positions == "sincos":
            embeddings.position_embeddings.weight.data = sincos_position_embedding([length], dim)[0]
            embeddings.position_embeddings.weight.requires_grad_(False)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay must leave alone."""
        return {"bert.embeddings.position_embeddings.weight", "bert.embeddings.token_type_embeddings.weight"}

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embed tokens ``(B, T)`` with their positions to ``(B, T, R)``, normalised."""
        return self.bert.embeddings(input_ids)

    def hybrid(self, embedded: Tensor, image: Tensor, attention_mask: Tensor, hidden: Tensor) -> Tensor:
        """Add the image's vector to tokens, after the embeddings' LayerNorm and dropout.

        Args:
            embedded: ``(B, T, R)``.
            image: ``(B, R)``.
            attention_mask: ``(B, T)``, 0 = padding.
            hidden: bool ``(B, T)``, True = hidden.
        """
        if self.fusion == "all":
            return embedded + image[:, None]
        visible = attention_mask.bool() & ~hidden
        return embedded + visible[..., None] * image[:, None]

    def forward(self, hybrid: Tensor, attention_mask: Tensor, index: Tensor) -> Tensor:
        """Predict tokens.

        Args:
            hybrid: ``(B, T, R)``, from :meth:`hybrid`.
            attention_mask: ``(B, T)``, 0 = padding.
            index: long ``(S,)``, positions to predict, counted through the flattened ``(B, T)``.

        Returns:
            Logits ``(S, V)``.
        """
        keys = attention_mask.bool()[:, None, None, :]
        if self.attend == "own":
            keys = torch.eye(hybrid.shape[1], dtype=torch.bool, device=hybrid.device)[None, None]
        tokens = self.bert.encoder(hybrid, attention_mask=keys).last_hidden_state
        return self.head(tokens.flatten(0, 1)[index])


class MRMOutput(NamedTuple):
    """The network's output.

    Attributes:
        pred: ``(B, S, P)``, the predicted patches.
        target: ``(B, S, P)``, in the units of the loss.
        logits: ``(S, V)`` at the hidden tokens.
    """

    pred: Tensor
    target: Tensor
    logits: Tensor


class MRM(nn.Module):
    """Encoder of visible low-resolution patches, decoder to high resolution, decoder of the report.

    Args:
        encoder: Of images ``1 / sr_factor`` of the target's size; must have a class token.
        decoder: To the target's patches.
        report: The report decoder.
        sr_factor: How many times finer the target is.
        target_norm: ``"patch"`` standardises each patch by itself, ``"unit"`` takes pixels in [0, 1], ``"dataset"``
            takes them standardised as they come.
        pool: ``"gap"`` averages the visible tokens, ``"gmp"`` takes their largest value.
        text_to_image: Whether the visible words' mean embedding is added to the visible patches before decoding.
        antialias: Whether the low-resolution copy is low-pass filtered; the published code's is not.
        mean: What the data subtracted from pixels in [0, 1].
        std: What they were divided by then.

    Raises:
        ValueError: the encoder has no class token.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        decoder: MAEDecoder,
        report: ReportDecoder,
        sr_factor: int = 2,
        target_norm: TargetNorm = "patch",
        pool: Pool = "gap",
        text_to_image: bool = False,
        antialias: bool = True,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        super().__init__()
        if not encoder.num_prefix_tokens:
            raise ValueError("The encoder of masked record modeling has a class token: set class_token to true.")
        self.encoder, self.decoder, self.report = encoder, decoder, report
        self.to_report = nn.Linear(encoder.embed_dim, report.dim)
        self.to_image = nn.Linear(report.dim, encoder.embed_dim) if text_to_image else None
        self.sr_factor, self.target_norm, self.pool, self.antialias = sr_factor, target_norm, pool, antialias
        self.mean, self.std = mean, std
        first, second = encoder.patch_embed.patch_size
        self.target_patch = (first * sr_factor, second * sr_factor)
        for module in (encoder, decoder, self.to_report, *([self.to_image] if self.to_image is not None else [])):
            module.apply(init_xavier_weights)
        nn.init.normal_(decoder.mask_token, std=0.02)

    def low_resolution(self, image: Tensor) -> Tensor:
        """Return the copy ``(B, 3, h, w)`` that the encoder sees of a standardised ``(B, 1, H, W)``."""
        if self.sr_factor > 1:
            size = [side // self.sr_factor for side in image.shape[-2:]]
            image = F.interpolate(image, size, mode="bicubic", align_corners=False, antialias=self.antialias)
        return image.expand(-1, self.encoder.patch_embed.in_channels, -1, -1)

    def target(self, image: Tensor, index: Tensor | None = None) -> Tensor:
        """Return the target patches ``(B, S, P)`` of ``(B, 1, H, W)``, in the units of the loss.

        Args:
            image: Standardised.
            index: long ``(B, S)``, the patches; None gives all.
        """
        source = image * self.std + self.mean if self.target_norm == "unit" else image
        patches = patchify_channels_last(source, self.target_patch)
        if index is not None:
            patches = patches.gather(1, index[..., None].expand(-1, -1, patches.shape[2]))
        channels = self.encoder.patch_embed.in_channels
        patches = patches[..., None].expand(-1, -1, -1, channels).flatten(2)
        return normalise_patches(patches) if self.target_norm == "patch" else patches

    def encode(self, image: Tensor, mask: MaskOutput) -> Tensor:
        """Encode the visible patches of ``(B, 1, H, W)`` to normalised tokens ``(B, 1 + K, E)``."""
        patches = self.encoder.patch_embed.patchify(self.low_resolution(image))
        return self.encoder.encode(self.encoder.embed(patches, mask.ids_keep)).tokens

    def image_vector(self, tokens: Tensor, present: Tensor) -> Tensor:
        """Return the vector ``(B, R)`` that goes to the report; 0 where ``present`` ``(B,)`` says there is no image."""
        patches = tokens[:, self.encoder.num_prefix_tokens :]
        pooled = patches.mean(1) if self.pool == "gap" else patches.amax(1)
        return self.to_report(pooled) * present[:, None]

    def report_logits(self, batch: ImageTextBatch, vector: Tensor, embedded: Tensor | None = None) -> Tensor:
        """Predict the hidden tokens of a batch, given the image's vector ``(B, R)``; ``(S, V)``."""
        embedded = self.report.embed(batch["input_ids"]) if embedded is None else embedded
        hybrid = self.report.hybrid(embedded, vector, batch["attention_mask"], batch["labels"] != -100)
        return self.report(hybrid, batch["attention_mask"], batch["hidden_index"])

    def decode(self, tokens: Tensor, mask: MaskOutput, words: Tensor | None, index: Tensor | None) -> Tensor:
        """Predict patches ``(B, S, P)``.

        Args:
            tokens: ``(B, 1 + K, E)``.
            mask: Where they belong.
            words: ``(B, R)``, the mean of the visible words, where they are fed to the image.
            index: long ``(B, S)``, the patches to predict; None predicts all.
        """
        if self.to_image is not None and words is not None:
            prefix, patches = tokens.tensor_split([self.encoder.num_prefix_tokens], dim=1)
            tokens = torch.cat([prefix, patches + self.to_image(words)[:, None]], dim=1)
        return self.decoder(tokens, mask.ids_restore, index)

    def forward(self, batch: ImageTextBatch, mask: MaskOutput, index: Tensor | None = None) -> MRMOutput:
        """Reconstruct patches and words.

        Args:
            batch: See :class:`common.types.ImageTextBatch`.
            mask: Hidden patches, from a masker that keeps equally many in each sample.
            index: long ``(B, S)``, the patches to predict; None predicts all.
        """
        tokens = self.encode(batch["image"], mask)
        vector = self.image_vector(tokens, batch["modality_mask"][:, 0])
        embedded = self.report.embed(batch["input_ids"])
        logits = self.report_logits(batch, vector, embedded)
        words = self.visible_words(batch, embedded) if self.to_image is not None else None
        return MRMOutput(self.decode(tokens, mask, words, index), self.target(batch["image"], index), logits)

    def spread(self, values: Tensor) -> Tensor:
        """Expand the value of each patch to its pixels: ``(B, N)`` to ``(B, 1, H, W)``."""
        first, second = self.target_patch
        grid = values.unflatten(1, self.encoder.grid_size)
        return grid.repeat_interleave(first, 1).repeat_interleave(second, 2)[:, None]

    def pixels(self, pred: Tensor, image: Tensor) -> Tensor:
        """Turn predicted patches into a standardised image, to look at.

        Patches that were predicted in units of their own mean and spread get those of the true patch.

        Args:
            pred: ``(B, N, P)``.
            image: ``(B, 1, H, W)``, the truth, standardised.

        Returns:
            ``(B, 1, H, W)``.
        """
        channels = self.encoder.patch_embed.in_channels
        grey = pred.unflatten(2, (-1, channels)).mean(3)
        if self.target_norm == "patch":
            true = patchify_channels_last(image.expand(-1, channels, -1, -1), self.target_patch)
            grey = grey * (true.var(2, keepdim=True) + PATCH_EPS).sqrt() + true.mean(2, keepdim=True)
        elif self.target_norm == "unit":
            grey = (grey - self.mean) / self.std
        return unpatchify(grey, self.encoder.grid_size, self.target_patch)

    @staticmethod
    def visible_words(batch: ImageTextBatch, embedded: Tensor) -> Tensor:
        """Return the mean embedding ``(B, R)`` of the words that are not hidden."""
        visible = (batch["attention_mask"].bool() & (batch["labels"] == -100)).to(embedded.dtype)[..., None]
        return (embedded * visible).sum(1) / visible.sum(1).clamp(min=1)
