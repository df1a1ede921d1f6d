"""Hugging Face's Trainer with Holdfast. Kill it in any way, start it again: training goes on as if nothing had happened."""

import logging

import holdfast
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

logging.basicConfig(level=logging.INFO)
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2))
data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (80, 16))]
arguments = TrainingArguments(
    "out", num_train_epochs=2, per_device_train_batch_size=4, gradient_accumulation_steps=2,
    use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
)  # fmt: skip
trainer = Trainer(model, arguments, train_dataset=data)  # type: ignore[arg-type]
survival = holdfast.HoldfastTrainerCallback()
survival.train(trainer)  # <- instead of trainer.train(): every optimizer step from now on survives
