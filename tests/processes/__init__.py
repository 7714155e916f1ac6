"""Training in several processes, against one process and one autograd call per sample."""
