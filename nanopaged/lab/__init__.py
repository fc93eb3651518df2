"""Assignments made from this very source: its functions without their bodies, graders, and bugs that prove the graders."""
