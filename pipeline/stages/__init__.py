"""The stages of the pipeline and the graph that connects them."""
