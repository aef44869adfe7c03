"""The experiments of the paper on small bilevel problems with an exact reference."""
