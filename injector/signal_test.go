package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// TestSecondSignal has a program that does not end at the first.
func TestSecondSignal(t *testing.T) {
	if os.Getenv("SELKIES_TEST_SIGNALS") != "" {
		ctx := interruptible()
		fmt.Println("runs")
		<-ctx.Done()
		fmt.Println("is cancelled")
		time.Sleep(time.Hour)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestSecondSignal$")
	cmd.Env = append(os.Environ(), "SELKIES_TEST_SIGNALS=1")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for _, want := range []string{"runs", "is cancelled"} {
		if !lines.Scan() || lines.Text() != want {
			t.Fatalf("says %q, %v, want %q", lines.Text(), lines.Err(), want)
		}
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
	}
	_ = cmd.Wait() // its state has more
	if status := cmd.ProcessState.Sys().(syscall.WaitStatus); status.Signal() != syscall.SIGTERM {
		t.Errorf("ended with %v", cmd.ProcessState)
	}
}
