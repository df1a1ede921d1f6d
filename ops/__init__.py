"""What operators use: the command line, the demo. It asks the other floors, and knows none of their internals."""
