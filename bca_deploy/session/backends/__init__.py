"""What runs a model: ONNX Runtime and TensorRT engines behind one interface, and the choice among them."""
