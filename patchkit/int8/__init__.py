"""int8 weights of linear layers and fused experts."""
