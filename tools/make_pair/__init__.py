"""How the embedded pair is made: a generated world, its tokenizer, pretraining, SFT and GRPO."""
