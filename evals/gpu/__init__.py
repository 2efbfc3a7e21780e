"""Checks and benchmarks that need a GPU, in one command of at most twelve minutes, the most important ones first.

    python3 -m evals.gpu                               # from the root of the repository, on one H100 or H200
    python3 -m evals.gpu --sections correctness        # a part of it
    python3 -m evals.gpu --device cpu --tiny           # every part at sizes without meaning, to try the script itself

It needs torch, transformers and triton, and imports patchkit from the current folder: nothing has to be installed. One JSON,
gpu_<device>.json, is written after each row, to the folder named by the environment variable OUT, else to evals/results/; a table is
printed. Sections that a run leaves out stay in the JSON unchanged. A section has a module of its own:

correctness    every backend of every op against the op's float64 definition on the device, with uninitialised memory set to NaN;
               int8_linear also on the shapes of the feed-forward blocks of Llama-3-8B; a row of one token alone and among 4 must have
               the same bits, and so must five rows alone and among 16
decode         one token after another through the shape of Pythia-2.8b with random fp16 weights at context 1024, interleaved. The share
               is (bytes of weights and of keys and values / copy bandwidth) / time
smollm2        a real pretrained model, where it is installed
bandwidth      int8_linear on those shapes, weight-only, compared with F.linear. Each pass reads a gigabyte of different weights,
               so that they come from memory. "graph" times the kernels alone, "launched" the calls from Python.
               A share is (bytes of the int8 weights / time) / (bytes read + bytes written / time of a copy on the device)
linear         linear_attention in bf16 from 512 to 65536 tokens, compared with SDPA (causal) and, where flash-linear-attention is
               installed, its chunked kernel. The share is (8 bytes for every element of q / copy bandwidth) / time; two replays of a
               CUDA graph must give the same bits, and those of a plain call
verification   verify_prefix, verify_prefix_sampled and kv_append on the shapes of Llama-3-8B and of a vocabulary of 50304, compared with
               torch's own operators, which must agree

The exit status is 1 if any row failed: a wrong result or an exception. A missed bar is reported, and is no failure.
"""
