"""Names of the original's Python interface, each with the call that replaces it here."""

_PLACED = "JAX has put the weights on its device already; leave the call out, or pass mesh= to from_pretrained"
_CALLS = {
    **dict.fromkeys(("to", "cuda", "cpu"), _PLACED),
    **dict.fromkeys(("half", "float", "bfloat16"), "pass dtype='bfloat16' or 'float32' to from_pretrained"),
    "eval": "a model here only samples; leave the call out",
    "train": "mindalle finetune trains (docs/fine-tuning.md)",
    "stage1": "model.encode_images(images) is stage1.get_codes, model.decode_codes(codes) is stage1.decode_code",
    "stage2": "model.logits(text_ids, codes) is stage2(codes, texts, pos_images, pos_texts)",
    "forward": "model.logits is the forward pass",
    "sample": "model.generate(prompt) samples",
    "save": "model.save_pretrained(folder) writes the model",
    "push_to_hub": "call model.save_pretrained(folder), then run `hf upload`",
    "device": "model.mesh holds the devices, model.backend their kind",
    **dict.fromkeys(("parameters", "state_dict"), "mindalle convert --to torch writes the weights for PyTorch"),
    "load_state_dict": "mindalle convert reads PyTorch's checkpoints",
}
MOVED = {
    "set_seed": "pass seed= to the call: model.generate(prompt, seed=0)",
    "clip_score": "ClipRanker.from_pretrained('ViT-B/32').rank(prompt, images) is clip_score",
}
"""Functions of the original's `dalle.utils` -> what to call here."""


def explain_torch_call(kind: str, name: str) -> str:
    """Returns the message of an AttributeError for the attribute `name` of a Dalle or ImageGPT (`kind`)."""
    calls = _CALLS
    if kind == "ImageGPT":
        sample = "model.generate(class_id, num_candidates=16) is sample(cls_idx=...)"
        calls = calls | {"stage2": "model.logits(codes, labels) is stage2", "sample": sample, "sampling": sample}
    message = f"{kind!r} object has no attribute {name!r}"
    return f"{message}: {calls[name]}" if name in calls else message
