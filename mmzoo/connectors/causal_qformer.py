"""Causal Q-Former: windows of synchronised audio and visual frames, each read by a few learned queries.

Sources: "Fine-grained Audio-Visual Joint Representations for Multimodal Large Language Models" (FAVOR), arXiv
2310.05863; "video-SALMONN: Speech-Enhanced Audio-Visual Large Language Models", arXiv 2406.15704. Parameter names are
those of the authors' checkpoints.

Shape legend: B items (a clip with its sound), T frames, V tokens of a frame, A audio steps of a frame, S audio steps,
C width of the queries and of each stream, E = streams x C, G frames of a window, W windows, N queries of a window,
D output width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmzoo.attention.backends import attend, eager_attention
from mmzoo.attention.compiler import allowed
from mmzoo.errors import InputError
from mmzoo.layout import Modality, Span, TokenLayout, lay_out, video
from mmzoo.masks import Rule
from mmzoo.masks.causal_qformer import Direction, causal_qformer, window_queries


class AttentionBlock(nn.Module):
    """BERT's attention: heads, a dense layer, and a norm of the sum with the input."""

    def __init__(self, width: int, key_width: int, num_heads: int, eps: float):
        super().__init__()
        if width % num_heads:
            raise InputError(f"{num_heads} heads do not divide the width {width}.")
        self.num_heads = num_heads
        self.self = nn.ModuleDict(
            {"query": nn.Linear(width, width), "key": nn.Linear(key_width, width), "value": nn.Linear(key_width, width)}
        )
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=eps)})

    def heads(self, hidden: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value by head."""
        parts = zip(("query", "key", "value"), (hidden, keys, keys), strict=True)
        made = (self.self[name](x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for name, x in parts)
        query, key, value = made
        return query, key, value

    def forward(
        self,
        hidden: Tensor,
        keys: Tensor,
        rule: Rule | None = None,
        layouts: tuple[TokenLayout, TokenLayout] | None = None,
        attention: str = "sdpa",
    ) -> Tensor:
        """As `hidden`; without a rule everything sees everything."""
        heads = self.heads(hidden, keys)
        if rule is None or layouts is None:
            attended = F.scaled_dot_product_attention(*heads)
        else:
            attended = attend(*heads, rule, *layouts, attention=attention)
        return self.output["LayerNorm"](self.output["dense"](attended.transpose(1, 2).flatten(2)) + hidden)


class FeedForward(nn.ModuleDict):
    """The second half of BERT's feed-forward block; the first is a dense layer."""

    def __init__(self, intermediate_size: int, width: int, eps: float):
        super().__init__({"dense": nn.Linear(intermediate_size, width), "LayerNorm": nn.LayerNorm(width, eps=eps)})

    def forward(self, inner: Tensor, hidden: Tensor) -> Tensor:
        return self["LayerNorm"](self["dense"](inner) + hidden)


class CausalQFormerLayer(nn.Module):
    """Queries attend to each other and then to the frames, which first attend to each other under the frame mask."""

    def __init__(self, width: int, frame_width: int, num_heads: int, intermediate_size: int, eps: float, causal: bool):
        super().__init__()
        self.attention = AttentionBlock(width, width, num_heads, eps)
        self.crossattention = AttentionBlock(width, frame_width, num_heads, eps)
        self.encoder_causal_attention = AttentionBlock(frame_width, frame_width, num_heads, eps) if causal else None
        self.intermediate_query = nn.ModuleDict({"dense": nn.Linear(width, intermediate_size)})
        self.output_query = FeedForward(intermediate_size, width, eps)

    def frame_states(self, frames: Tensor, rule: Rule, layout: TokenLayout, attention: str) -> Tensor:
        """[B*W, G*V, E]: the frames of each window after the causal block, of the same input in each layer."""
        if self.encoder_causal_attention is None:
            return frames
        return self.encoder_causal_attention(frames, frames, rule, (layout, layout), attention)

    def forward(
        self,
        hidden: Tensor,
        frames: Tensor,
        rules: tuple[Rule, Rule],
        layouts: tuple[TokenLayout, TokenLayout, TokenLayout],
        attention: str,
    ) -> Tensor:
        """[B*W, N, C]; rules of frames and of queries; layouts of queries, frames, and frames without padding."""
        queries, every, real = layouts
        states = self.frame_states(frames, rules[0], every, attention)
        hidden = self.attention(hidden, hidden)
        hidden = self.crossattention(hidden, states, rules[1], (queries, real), attention)
        return self.output_query(F.gelu(self.intermediate_query["dense"](hidden)), hidden)


class CausalQFormer(nn.Module):
    """The stack of layers under the name that the authors' checkpoints give it: `bert`."""

    def __init__(
        self,
        hidden_size: int,
        frame_width: int,
        num_heads: int,
        intermediate_size: int,
        num_layers: int,
        eps: float,
        causal: bool,
    ):
        super().__init__()
        sizes = hidden_size, frame_width, num_heads, intermediate_size, eps, causal
        layers = nn.ModuleList(CausalQFormerLayer(*sizes) for _ in range(num_layers))
        norm = nn.ModuleDict({"LayerNorm": nn.LayerNorm(hidden_size, eps=eps)})
        self.bert = nn.ModuleDict({"embeddings": norm, "encoder": nn.ModuleDict({"layer": layers})})

    @property
    def layers(self) -> Sequence[CausalQFormerLayer]:
        return self.bert["encoder"]["layer"]  # type: ignore[index,return-value]

    def embedded(self, queries: Tensor) -> Tensor:
        return self.bert["embeddings"]["LayerNorm"](queries)  # type: ignore[index,operator]


def synchronise(video: Tensor, audio: Tensor, audio_per_frame: int, modality_mask: Tensor | None = None) -> Tensor:
    """Audio and visual frames side by side: [B, T, V, C + D], zeros where one stream is shorter.

    Args:
        video: [B, T_v, V, C].
        audio: [B, S, D]: `audio_per_frame` steps meet one visual frame; zeros stand beside its other tokens.
        audio_per_frame: A.
        modality_mask: [B, 2]: 0 silences the video or the audio of an item.

    Raises:
        InputError: a frame has more audio steps than tokens.
    """
    tokens = video.shape[2]
    if audio_per_frame > tokens:
        raise InputError(f"A frame of {tokens} tokens has no room for {audio_per_frame} audio steps.")
    audio = F.pad(audio, (0, 0, 0, -audio.shape[1] % audio_per_frame)).unflatten(1, (-1, audio_per_frame))
    audio = F.pad(audio, (0, 0, 0, tokens - audio_per_frame))
    length = max(video.shape[1], audio.shape[1])
    streams = [F.pad(x, (0, 0, 0, 0, 0, length - x.shape[1])) for x in (video, audio)]
    if modality_mask is not None:
        streams = [x * modality_mask[:, i, None, None, None].to(x.dtype) for i, x in enumerate(streams)]
    return torch.cat(streams, -1)


def diversity_loss(queries: Tensor) -> Tensor:
    """Mean cosine similarity of each pair of different queries of a window [..., N, C]; its authors weigh it 0.01."""
    unit = F.normalize(queries, dim=-1)
    count = queries.shape[-2]
    similar = (unit @ unit.transpose(-1, -2)).sum((-1, -2)) - count
    return (similar / (count * (count - 1))).mean()


class AudioVisualQFormer(nn.Module):
    """From the tokens of visual frames and audio steps to a few tokens for every window of both.

    Args:
        audio_sizes: width of each audio encoder's output (FAVOR: Whisper; video-SALMONN: Whisper, BEATs).
        output_size: D.
        hidden_size: C, which the visual tokens have, too.
        num_queries: N of a window.
        window: G; frames are half a second each.
        fine_queries: queries of each single frame, beside those of the windows (video-SALMONN's multi-resolution
            Q-Former, with the same weights); it must give as many tokens as the windows do. 0 for none.
        num_heads, num_layers, intermediate_size, layer_norm_eps: of the Q-Former.
        audio_per_frame: A.
        causal: whether frames attend to each other before the queries read them.
        direction, mask_padding: of the frame mask, see `mmzoo.masks.causal_qformer`; what released weights need is
            "future" and False.
        max_positions: rows of the position table; positions start again in each window.

    Raises:
        InputError: sizes that do not fit.
    """

    def __init__(
        self,
        audio_sizes: Sequence[int],
        output_size: int,
        hidden_size: int = 768,
        num_queries: int = 32,
        window: int = 10,
        fine_queries: int = 0,
        num_heads: int = 12,
        num_layers: int = 2,
        intermediate_size: int = 3072,
        layer_norm_eps: float = 1e-12,
        audio_per_frame: int = 25,
        causal: bool = True,
        direction: Direction = "future",
        mask_padding: bool = False,
        max_positions: int = 4096,
    ):
        super().__init__()
        if len(audio_sizes) not in (1, 2):
            raise InputError(f"A causal Q-Former hears one or two audio encoders, not {len(audio_sizes)}.")
        if fine_queries and fine_queries * window != num_queries:
            raise InputError(
                f"{window} frames with {fine_queries} queries each give {fine_queries * window} tokens, a window gives "
                f"{num_queries}: they must be as many."
            )
        width = hidden_size * (1 + len(audio_sizes))
        self.window, self.audio_per_frame, self.attention = window, audio_per_frame, "sdpa"
        self.rule, self.query_rule = causal_qformer(direction, mask_padding), window_queries()
        self.speech_pre_qformer_proj = nn.Linear(audio_sizes[0], hidden_size)
        self.beats_pre_qformer_proj = nn.Linear(audio_sizes[1], hidden_size) if len(audio_sizes) == 2 else None
        self.ln_video = nn.LayerNorm(width)
        self.video_frame_position_embedding = nn.Embedding(max_positions, width)
        self.video_query_tokens = nn.Parameter(0.02 * torch.randn(1, num_queries, hidden_size))
        self.low_query_tokens = None
        if fine_queries:
            self.low_query_tokens = nn.Parameter(0.02 * torch.randn(1, fine_queries, hidden_size))
        self.video_Qformer = CausalQFormer(
            hidden_size, width, num_heads, intermediate_size, num_layers, layer_norm_eps, causal
        )
        self.llama_proj = nn.Linear(hidden_size * (2 if fine_queries else 1), output_size)

    def audio_features(self, *streams: Tensor) -> Tensor:
        """[B, S, audio streams x C] of the encoders' outputs [B, S, ...]; a shorter second one is filled up with 0."""
        features = [self.speech_pre_qformer_proj(streams[0])]
        if self.beats_pre_qformer_proj is not None:
            second = F.pad(streams[1], (0, 0, 0, streams[0].shape[1] - streams[1].shape[1]))
            features.append(self.beats_pre_qformer_proj(second))
        return torch.cat(features, -1)

    def num_windows(self, num_frames: Tensor) -> Tensor:
        """int64 [...]: windows of items of so many frames."""
        return (num_frames + self.window - 1) // self.window

    def forward(self, joint: Tensor, num_frames: Tensor) -> Tensor:
        """Tokens [B, W, N, D] of synchronised frames [B, T, V, E]; windows after an item's last one say nothing.

        Args:
            joint: what `synchronise` gives.
            num_frames: int64 [B], of the longer stream of each item.
        """
        return self.llama_proj(self.query_states(joint, num_frames))

    def query_states(self, joint: Tensor, num_frames: Tensor) -> Tensor:
        """[B, W, N, C] before the last layer; with fine queries [B, W, N, 2 * C], these first."""
        joint = F.pad(joint, (0, 0, 0, 0, 0, -joint.shape[1] % self.window))
        # An item's frames end where its own last window does, whatever pads the batch.
        states = self.read(joint, num_frames, self.window, self.video_query_tokens)
        if self.low_query_tokens is None:
            return states
        fine = self.read(joint, num_frames, 1, self.low_query_tokens)
        return torch.cat([fine.flatten(1, 2).unflatten(1, states.shape[1:3]), states], -1)

    def read(self, joint: Tensor, num_frames: Tensor, window: int, queries: Tensor) -> Tensor:
        """[B, W, N, C]: what the queries read in windows of `window` frames, of which T must be a multiple."""
        frames, layouts = self.windows(joint, num_frames, window, queries.shape[1])
        hidden = self.video_Qformer.embedded(queries.expand(len(frames), -1, -1))
        for layer in self.video_Qformer.layers:
            hidden = layer(hidden, frames, (self.rule, self.query_rule), layouts, self.attention)
        return hidden.unflatten(0, (len(joint), -1))

    def windows(
        self, joint: Tensor, num_frames: Tensor, window: int, num_queries: int
    ) -> tuple[Tensor, tuple[TokenLayout, TokenLayout, TokenLayout]]:
        """Frames [B*W, G*V, E] with their positions, and the layouts of queries, frames, and frames without padding.

        Raises:
            InputError: the position table is too short.
        """
        tokens, (rows, total) = joint.shape[2], joint.shape[:2]
        if window * tokens > self.video_frame_position_embedding.num_embeddings:
            raise InputError(
                f"A window of {window} frames of {tokens} tokens needs {window * tokens} positions; the table has "
                f"{self.video_frame_position_embedding.num_embeddings}."
            )
        frames = joint.unflatten(1, (-1, window)).flatten(0, 1).flatten(1, 2)
        frames = self.ln_video(frames) + self.video_frame_position_embedding.weight[: window * tokens]
        count, device = len(frames), joint.device
        queries = lay_out(Span(Modality.QUERY, rows=num_queries, grid=False)).to(device)
        every = lay_out(video(window, tokens, grid=False)).to(device)
        every = TokenLayout(every.data.expand(count, -1, -1))
        filled = torch.arange(total, device=device) >= num_frames[:, None]
        filled = filled.view(rows * (total // window), window).repeat_interleave(tokens, 1)
        real = every.field("frame", torch.where(filled, -1, every.frame))
        return frames, (TokenLayout(queries.data.expand(count, -1, -1)), real if self._masks_padding else every, real)

    @property
    def _masks_padding(self) -> bool:
        return self.rule.terms[0].key != self.rule.terms[0].query

    @torch.no_grad()
    def frame_weights(self, joint: Tensor, num_frames: Tensor) -> Tensor:
        """[B, W, N, G * V]: how much each query takes from each token of its window, mean over heads and layers."""
        joint = F.pad(joint, (0, 0, 0, 0, 0, -joint.shape[1] % self.window))
        queries = self.video_query_tokens
        frames, layouts = self.windows(joint, num_frames, self.window, queries.shape[1])
        hidden, weights = self.video_Qformer.embedded(queries.expand(len(frames), -1, -1)), []
        for layer in self.video_Qformer.layers:
            states = layer.frame_states(frames, self.rule, layouts[1], self.attention)
            heads = layer.crossattention.heads(layer.attention(hidden, hidden), states)
            weights.append(eager_attention(*heads, allowed(self.query_rule, layouts[0], layouts[2]))[1].mean(1))
            hidden = layer(hidden, frames, (self.rule, self.query_rule), layouts, self.attention)
        return torch.stack(weights).mean(0).unflatten(0, (len(joint), -1))
