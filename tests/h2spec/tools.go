//go:build tools

// Package h2spec names the program that test_h2spec.py builds, so that go.mod and go.sum pin it.
package h2spec

import _ "github.com/summerwind/h2spec/cmd/h2spec"
