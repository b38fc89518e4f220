"""What chooses the weights that go: methods, allocations, row steps and refinements."""
