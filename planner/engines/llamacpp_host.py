"""What llama-server takes of host memory beside the devices.

- token_embd, and the routed experts of layers whose experts do not fit on a device; their file stays mapped.
- `llama-context.cpp`: inputs of the graph, the mask among them, token rows, and a row of logits per sequence.
- `tools/server`: up to 32 checkpoints of the recurrent state per slot, 8192 tokens apart at least, and a cache of
  prompts of up to 8 GiB (told in warnings, for it is a limit and not a need).
"""

from ...profiles.frozen import dataclass
from ...profiles.model import Model
from ..memory import Memory, estimated, exactly
from .llamacpp_cache import DEFAULT_BATCH_TOKENS, layer_state_bytes
from .llamacpp_compute import PIPELINE_COPIES, Batch, host_bytes

MIB = 1 << 20
CHECKPOINTS_PER_SLOT = 32  # --ctx-checkpoints
CHECKPOINT_STEP_TOKENS = 8192  # --checkpoint-min-step
PROMPT_CACHE_MIB = 8192  # --cache-ram
PROCESS = estimated(250 * MIB, 500 * MIB, 1200 * MIB)  # server, driver library, tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class Host:
    """The host's side of one setup."""

    model: Model
    embedding_bytes: int  # token_embd; 0 where the host is the device
    moved_sums: tuple[int, ...]  # bytes of the routed experts of the first 0, 1, 2, ... layers
    drafts: bool
    devices: int

    def memory(self, batch: Batch, moved: int, ctx_tokens: int) -> Memory:
        """`moved` of the first layers have their experts here."""
        inputs = self._input_bytes(batch) + self._moved_activation_bytes(moved, batch.tokens)
        checkpoints = self.checkpoint_bytes(ctx_tokens, batch.seqs)
        copies = PIPELINE_COPIES if self.devices > 1 and not moved else 1
        return Memory(
            weights=exactly(self.embedding_bytes + self.moved_bytes(moved)),
            recurrent_state=estimated(0, checkpoints, checkpoints),
            activation=estimated(inputs, inputs, copies * inputs),
            runtime=PROCESS,
        )

    def resident_bytes(self, batch: Batch, ctx_tokens: int) -> int:
        """The expected figure of `memory` while all experts lie on the devices."""
        found = self.embedding_bytes + PROCESS.mid + self._input_bytes(batch)
        return found + self.checkpoint_bytes(ctx_tokens, batch.seqs)

    def moved_needs_bytes(self, moved: int, tokens: int) -> int:
        """What the first `moved` layers' experts add, with what they compute on the CPU for a batch of tokens."""
        return self.moved_sums[moved] + self._moved_activation_bytes(moved, tokens)

    def moved_bytes(self, moved: int) -> int:
        return self.moved_sums[moved]

    def logits_bytes(self, seqs: int) -> int:
        return 4 * self.model.vocab_size * seqs * (2 if self.drafts else 1)

    def seed_bytes(self, tokens: int) -> int:
        """The last hidden states, kept for the draft: `h_nextn` is an output of the graph."""
        return 4 * self.model.hidden_size * tokens

    def checkpoint_bytes(self, ctx_tokens: int, seqs: int) -> int:
        """Copies of the state, which llama-server makes while it reads prompts."""
        count = ctx_tokens // CHECKPOINT_STEP_TOKENS + 1
        if count > CHECKPOINTS_PER_SLOT:
            count = CHECKPOINTS_PER_SLOT
        return seqs * count * self.model.linear_attention_layers * layer_state_bytes(self.model)

    def _input_bytes(self, batch: Batch) -> int:
        found = host_bytes(self.model, batch) + self.logits_bytes(batch.seqs)
        return found + (self.seed_bytes(DEFAULT_BATCH_TOKENS + batch.seqs) if self.drafts else 0)

    def _moved_activation_bytes(self, moved: int, tokens: int) -> int:
        return 6 * self.model.num_experts_per_tok * self.model.hidden_size * tokens if moved else 0
