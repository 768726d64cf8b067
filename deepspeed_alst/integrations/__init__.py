"""HF Trainer, TRL, PEFT, Liger, and programs written for DeepSpeed's own ALST."""
