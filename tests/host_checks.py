"""nextn against the host itself: what one host says alone, and what nextn must give on it."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

import nextn
from hosts import VOCAB
from nextn.decoding.drafting import Drafts, HeadDrafter
from nextn.decoding.engine import Engine
from nextn.decoding.sampling import Sampling
from nextn.formats import FormatError
from nextn.trunk import Trunk

LENGTHS, NEW = (3, 11, 29), 40  # of the prompts, and new tokens: past the windows of sliding layers
NEAR_TIE = 1e-3
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


class Wrong(Exception):  # noqa: N818 (a finding)
    """nextn gave another result than the host."""


class Hinted(HeadDrafter):
    """Heads of whose drafts two in three are replaced by the right tokens, so that some are accepted, some rejected.

    Args:
        texts: prompt and text by row.
    """

    def __init__(self, trunk: Trunk, heads: Any, texts: list[list[int]]) -> None:
        super().__init__(trunk, heads)
        longest = max(map(len, texts)) + self.drafts + 1
        self.texts = torch.stack([F.pad(torch.tensor(text), (0, longest - len(text))) for text in texts])

    def propose(self, hidden: Tensor, positions: Tensor, following: Tensor, last: Tensor, rows: Tensor, *rest: Any):
        drafts = super().propose(hidden, positions, following, last, rows, *rest)
        batch = torch.arange(len(rows))
        pending = positions[batch, last] + 1
        ahead = pending[:, None] + 1 + torch.arange(drafts.tokens.shape[1])
        right = self.texts[rows[:, None], ahead.clamp(0, self.texts.shape[1] - 1)]
        return Drafts(torch.where(ahead % 3 == 0, drafts.tokens, right))


class Host:
    """One host and what it says by itself.

    texts: its own greedy continuations of the prompts, each generated alone.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        generator = torch.Generator().manual_seed(1)
        self.prompts = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]
        self.texts = [self._generated(prompt) for prompt in self.prompts]

    @torch.no_grad()
    def _generated(self, prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        config = transformers.GenerationConfig(
            max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, use_cache=True
        )
        mask = torch.ones_like(ids)
        return self.model.generate(ids, attention_mask=mask, generation_config=config)[0, len(prompt) :].tolist()

    @torch.no_grad()
    def logits(self, prompt: list[int], tokens: list[int]) -> Tensor:
        """Its logits for each token of a text, without a cache [len(tokens), V]."""
        ids = torch.tensor([prompt + tokens[:-1]])
        return self.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float()

    def compare(self, engine: Engine, new: int, what: str) -> None:
        """Decode all prompts in one batch; each token is the host's own, or a near tie with it."""
        results = dict(engine.generate(self.prompts, new))
        for row, prompt in enumerate(self.prompts):
            tokens = results[row].tokens
            if results[row].error is not None:
                raise results[row].error
            if len(tokens) != new:
                raise Wrong(f"{what} gave {len(tokens)} tokens for {new}")
            if tokens == self.texts[row][:new]:
                continue
            logits = self.logits(prompt, tokens)
            gap = logits.max(dim=-1).values - logits[range(len(tokens)), tokens]
            if gap.max() > NEAR_TIE:
                raise Wrong(f"{what} differs from the host's text at token {int((gap > NEAR_TIE).long().argmax())}")

    def compare_sampling(self, trunk: Trunk) -> None:
        """At temperature 1 the plain engine draws from the softmax of the host's logits."""
        engine = Engine(trunk, None, len(self.prompts))
        results = dict(engine.generate(self.prompts, 6, sampling=Sampling(temperature=1.0, seed=5), keep_scores=True))
        for row, prompt in enumerate(self.prompts):
            theirs = self.logits(prompt, results[row].tokens).softmax(dim=-1)
            ours = torch.stack(results[row].scores).float().softmax(dim=-1)
            if not torch.allclose(ours, theirs, **CLOSE):
                raise Wrong(f"sampling scores differ by {(ours - theirs).abs().max():.2g}")

    def compare_loss(self, model: Any) -> None:
        """Training gives finite losses and gradients, and head 1's loss is the host's own cross-entropy."""
        ids = torch.tensor([prompt[:2] + text[:24] for prompt, text in zip(self.prompts, self.texts, strict=True)])
        found = model.train()(input_ids=ids, labels=ids)
        found.loss.backward()
        model.eval()
        with torch.no_grad():
            logits = self.model(input_ids=ids, use_cache=False).logits.float()
        theirs = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        if not torch.allclose(found.depth_losses[0], theirs, **CLOSE):
            raise Wrong(f"head 1's loss is {found.depth_losses[0]:.4f}, the host's own {theirs:.4f}")
        gradients = [each.grad for each in model.heads.parameters() if each.grad is not None]
        if not found.loss.isfinite() or not gradients or not all(grad.isfinite().all() for grad in gradients):
            raise Wrong("training gives no finite loss and gradients")

    def compare_loaded(self, model: Any) -> None:
        """A saved model opens with the same heads and the same logits."""
        ids = torch.tensor([self.prompts[1]])
        with tempfile.TemporaryDirectory() as directory, torch.no_grad():
            model.save_pretrained(directory)
            try:
                again = nextn.load(directory)
            except FormatError as error:
                raise FormatError(str(error).replace(f" {directory}", "")) from None  # the same words each time
            if not torch.allclose(again(input_ids=ids).logits, model(input_ids=ids).logits, **CLOSE):
                raise Wrong("a saved and loaded model gives other logits")
        ours, theirs = model.heads.state_dict(), again.heads.state_dict()
        if not all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()):
            raise Wrong("saved and loaded heads differ")
