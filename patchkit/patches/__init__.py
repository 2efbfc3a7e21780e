"""One file per technique. A new patch is a new file here; nothing lists them."""
