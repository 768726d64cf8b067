"""Process groups, the mpu that DeepSpeed is handed, and what ranks tell each other."""
