"""Timings: tokens, seconds and bytes of the last generation, stage by stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timings:
    """What the last call cost. Seconds are wall time; bytes are weights that one step reads, in
    `decode_bytes` all steps together, dense ones among them.

    Prefill seconds include counting; selection, compaction and the patch come after it and before
    the first decoded token, so they belong to the time to first token of a generation with core
    neurons, as do embedding the prompt and looking its cluster up. In exact mode drafts (made, and
    those that came true) are inside the decode seconds; replays of `refresh` stand beside them.
    Resident bytes are the process's, when asked and at most since it began; the model file's
    mapped pages are among them.
    """

    load_seconds: float = 0.0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    count_seconds: float = 0.0
    select_seconds: float = 0.0
    compact_seconds: float = 0.0
    compact_bytes: int = 0
    patch_seconds: float = 0.0
    patch_bytes: int = 0
    decode_tokens: int = 0
    decode_bytes: int = 0
    decode_seconds: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    verifications: int = 0
    draft_seconds: float = 0.0
    replay_tokens: int = 0
    replay_seconds: float = 0.0
    embed_seconds: float = 0.0
    lookup_seconds: float = 0.0
    reused_tokens: int = 0
    dense_weight_bytes: int = 0
    decode_weight_bytes: int = 0
    kv_bytes: int = 0
    resident_bytes: int = 0
    peak_resident_bytes: int = 0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens a second, 0 if none was computed."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Decoded tokens a second, 0 if none was."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds > 0 else 0.0

    @property
    def acceptance(self) -> float | None:
        """Share of the drafts of exact mode that came true; None if there were none."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None

    @property
    def decode_gb_per_second(self) -> float:
        """Weight bytes that decoding one by one would read a second, in 10^9 bytes; 0 for none."""
        return self.decode_bytes / self.decode_seconds / 1e9 if self.decode_seconds > 0 else 0.0

    def as_dict(self) -> dict[str, float | None]:
        """Fields and rates, ready for JSON."""
        return {
            **dataclasses.asdict(self),
            "acceptance": self.acceptance,
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "decode_gb_per_second": self.decode_gb_per_second,
        }


# Counters of the session that grow with every call; a generation's share is a difference.
COUNTERS = {
    "prefill_tokens": int,
    "prefill_seconds": float,
    "count_seconds": float,
    "select_seconds": float,
    "compact_seconds": float,
    "patch_seconds": float,
    "decode_tokens": int,
    "decode_bytes": int,
    "decode_seconds": float,
    "drafted_tokens": int,
    "accepted_tokens": int,
    "verifications": int,
    "draft_seconds": float,
    "replay_tokens": int,
    "replay_seconds": float,
}


def since(now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """What the counters grew by since `before`."""
    return {name: kind(now.get(name, 0) - before.get(name, 0)) for name, kind in COUNTERS.items()}
