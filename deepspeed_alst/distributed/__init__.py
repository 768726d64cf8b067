"""Process groups, DeepSpeed's mpu, and what ranks exchange."""
