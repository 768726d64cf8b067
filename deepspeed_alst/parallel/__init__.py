"""Process groups, the mpu passed to DeepSpeed, gradient reduction, and agreement between ranks."""
