"""The loop as a LangGraph: state, nodes, stop policy, the compiled graph, and the doors to it."""
