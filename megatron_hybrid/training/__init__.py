"""Forward step, loss and what the training loop needs beside Megatron."""
