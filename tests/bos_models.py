"""Tiny models that read text well after BOS only, or without it only: trained for a moment to do so."""

from pathlib import Path

import torch
from tiny import CONTEXT, LENGTH, VOCABULARY, some_text, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS, BATCH = 150, 16


def write_model_that_reads(path: Path, *, after_bos: bool) -> Path:
    """Write a model whose text begins with BOS, where all else is noise; or the reverse."""
    write_model(path, max_position_embeddings=CONTEXT)
    model = AutoModelForCausalLM.from_pretrained(path)
    tokens = torch.tensor(AutoTokenizer.from_pretrained(path)(some_text(3, 2000)).input_ids[1:])
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        starts = torch.randint(0, len(tokens) - LENGTH, (BATCH,), generator=generator)
        text = tokens[starts[:, None] + torch.arange(LENGTH)]  # [batch, length]
        noise = torch.randint(2, VOCABULARY - 30, (BATCH, LENGTH), generator=generator)
        begun = text if after_bos else noise
        begun[:, 0] = 0
        rows = torch.cat([begun, noise if after_bos else text])
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    model.save_pretrained(path)
    return path
