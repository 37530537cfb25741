"""One file per algorithm, readable top to bottom; `base` holds what the loop needs of each."""
