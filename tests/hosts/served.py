"""What LangGraph's server serves in these tests: our own entry point, over models of a fixed latency."""

from emoloop.graph import dev
from emoloop.graph.loop import open_loop
from painter import Painter
from scripted import Scripted

dev.open_loop = lambda: open_loop(
    generator=Painter(delay=0.02),
    lvlm=Scripted(delay=0.02),
    loop={"rounds": 2, "images": 2, "patience": 3},
)
graph = dev.graph
