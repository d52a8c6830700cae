"""The peer of throughput.py: the same steps by transformers and torch. Runs in an environment of its own.

    python benchmarks/peers/torch_steps.py WEIGHTS TOKENS REQUEST [--compile]

Takes and prints what benchmarks/steps.py does; WEIGHTS must be there.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

torch.set_num_threads(len(os.sched_getaffinity(0)))  # by default one for each core; XLA takes one for each processor


class Loss(torch.nn.Module):
    """Mean nats a token, from tokens [B, T] and the tokens that follow them."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=tokens, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def main() -> None:
    weights, tokens, work = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    batches = torch.from_numpy(np.load(tokens)).long()
    model = transformers.AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32, attn_implementation="sdpa").train()
    named = list(model.named_parameters())
    groups = [
        {"params": [weight for name, weight in named if "norm" not in name], "weight_decay": work["weight_decay"]},
        {"params": [weight for name, weight in named if "norm" in name], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=work["lr"], betas=(work["beta1"], work["beta2"]), eps=work["epsilon"], fused=True)
    loss_of = Loss(model)
    if "--compile" in sys.argv:
        loss_of = torch.compile(loss_of)
    losses = []

    def step(batch: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), work["max_grad_norm"])
        optimizer.step()
        losses.append(loss.item())

    step(batches[0])
    first_done = time.time()
    step(batches[1])  # torch may compile something again
    began, cpu = time.monotonic(), time.process_time()
    for batch in batches[2:]:
        step(batch)
    seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu
    print(json.dumps({"first_done": first_done, "seconds": seconds, "cpu_seconds": cpu_seconds, "losses": losses}))


if __name__ == "__main__":
    main()
