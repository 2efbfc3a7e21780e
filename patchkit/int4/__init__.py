"""int4 weights of linear layers and fused experts, in groups of inputs."""
