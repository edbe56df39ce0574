"""What every test starts from: no network, and one thread, as threads of tiny networks mostly wait for each other."""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start

import torch

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes from what it runs in the background

torch.set_num_threads(1)
