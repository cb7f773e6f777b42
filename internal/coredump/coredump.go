// Package coredump keeps the secrets in a process's memory out of core dumps.
package coredump
