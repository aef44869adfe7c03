"""Everything of this project that is to be measured on a GPU, in one short command."""
