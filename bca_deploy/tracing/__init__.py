"""A module becomes a checked ONNX graph of exactly the opset asked for, and nothing that tracing narrowed goes unsaid."""
