"""What transformers and PEFT compute with tiny random Gemmas: the numbers that our own decoder, optimizer and LoRA are held to.

Run by hand, in an environment of its own (`pip install torch transformers peft`), when something here changes; tests read what it wrote:

    gemma/<name>/config.json, model.safetensors    a model as transformers saves it, every weight random, norms among them
    gemma/<name>/expected.npz                      tokens, logits, losses of five steps
    gemma/<name>/adapter_before/, adapter_after/   as PEFT saves them, before and after five steps

Every model has the whole structure of its generation: grouped heads, a window smaller than the sequence, a global layer, soft caps that
bend the logits, the scaling of long rotary positions.
"""

import json
import sys
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "attn_implementation": "eager",
}
WINDOW = 6
GEMMA3 = {"num_hidden_layers": 7, "sliding_window": WINDOW, "query_pre_attn_scalar": 12}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
LONG_ROPE = {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0}
MODELS = {
    "gemma": lambda: transformers.GemmaConfig(**SHAPE, num_hidden_layers=2),
    "gemma2": lambda: transformers.Gemma2Config(
        **SHAPE,
        num_hidden_layers=4,
        sliding_window=WINDOW,
        query_pre_attn_scalar=12,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SHAPE, **GEMMA3, rope_parameters={"full_attention": ROPE | {"rope_theta": 1_000_000.0}, "sliding_attention": ROPE}
    ),
    "gemma3-long": lambda: transformers.Gemma3TextConfig(
        **SHAPE, **GEMMA3, rope_parameters={"full_attention": LONG_ROPE, "sliding_attention": ROPE}
    ),
}
LENGTH, PADDED_LENGTHS, DOCUMENTS = 24, (24, 15), (11, 13)
STEPS, BATCH = 5, 4
ADAMW = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8}
WEIGHT_DECAY, MAX_GRAD_NORM = 0.1, 1.0
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "task_type": "CAUSAL_LM"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_model(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(sorted(MODELS).index(name))
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name](), attn_implementation="eager").float().eval()
    for weight_name, weight in model.named_parameters():
        scale = 0.2 if "norm" in weight_name else 1.2 * weight.shape[-1] ** -0.5
        torch.nn.init.normal_(weight, std=scale)
    return model


def logits(model: transformers.PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask).logits.numpy()


def train(model: transformers.PreTrainedModel, batches: torch.Tensor, learned: torch.Tensor) -> list[float]:
    """The loss before every step and after the last, on the step's own batch (after the last: on the last one)."""
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for name, weight in trained if "norm" not in name], "weight_decay": WEIGHT_DECAY},
        {"params": [weight for name, weight in trained if "norm" in name], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **ADAMW)
    losses = []
    for step in range(STEPS + 1):
        at = min(step, STEPS - 1)
        tokens, labels = batches[at], batches[at].masked_fill(~learned[at], -100)
        loss = model(input_ids=tokens, labels=labels).loss
        losses.append(float(loss))
        if step < STEPS:
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([weight for _, weight in trained], MAX_GRAD_NORM)
            optimizer.step()
    return losses


def write(name: str, folder: Path) -> None:
    model = make_model(name)
    model.save_pretrained(folder)
    tokens = torch.randint(4, SHAPE["vocab_size"], (2, LENGTH))
    mask = torch.tensor([[1] * n + [0] * (LENGTH - n) for n in PADDED_LENGTHS])
    batches = torch.randint(4, SHAPE["vocab_size"], (STEPS, BATCH, LENGTH))
    learned = torch.rand(batches.shape) > 0.3
    first, second = DOCUMENTS
    expected = {
        "tokens": tokens.numpy(),
        "logits": logits(model, tokens),
        "padded_lengths": np.array(PADDED_LENGTHS),
        "padded_logits": logits(model, tokens, mask),
        "documents": np.array(DOCUMENTS),
        "first_logits": logits(model, tokens[:1, :first]),
        "second_logits": logits(model, tokens[:1, first : first + second]),
        "batches": batches.numpy(),
        "learned": learned.numpy(),
    }
    adapted = peft.get_peft_model(make_model(name), peft.LoraConfig(**LORA, target_modules=TARGETS))
    adapted.save_pretrained(folder / "adapter_before")
    expected["lora_losses"] = np.array(train(adapted, batches, learned))
    adapted.save_pretrained(folder / "adapter_after")
    expected["lora_logits"] = logits(adapted, tokens)
    expected["full_losses"] = np.array(train(model, batches, learned))
    expected["full_logits"] = logits(model, tokens)
    np.savez_compressed(folder / "expected.npz", **expected)
    for left in (folder / "generation_config.json", *folder.glob("adapter_*/README.md")):
        left.unlink(missing_ok=True)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "gemma"
    for name in MODELS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        write(name, folder / name)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    settings = {"adamw": ADAMW, "weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_GRAD_NORM, "lora": LORA, "targets": TARGETS}
    (folder / "made_with.json").write_text(json.dumps({"versions": versions, "settings": settings}, indent=1) + "\n")


if __name__ == "__main__":
    main()
