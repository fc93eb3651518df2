"""Assignments made from this source: functions without bodies, graders, and bugs that prove the graders."""
