package gcp

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
)

// A list's filter: comparisons with =, !=, <, <=, >, >=, ":" and the older "eq" and
// "ne", joined by AND, OR, NOT and parentheses; neighbours are joined by AND.
// Google's reference is the description of the parameter filter of images.list.

// matcher says whether a resource passes a filter.
type matcher func(resource) (bool, error)

func parseFilter(filter string) (matcher, error) {
	p := &filterParser{tokens: filterTokenRE.FindAllString(filter, -1)}
	if len(p.tokens) == 0 {
		return func(resource) (bool, error) { return true, nil }, nil
	}
	match := p.or()
	if p.err == nil && len(p.tokens) > 0 {
		p.fail()
	}
	if p.err != nil {
		return nil, invalid("filter", filter, "Invalid list filter expression: "+p.err.Error())
	}
	return func(r resource) (bool, error) {
		data, err := protojson.Marshal(r)
		if err != nil {
			return false, err
		}
		var fields map[string]any
		if err := json.Unmarshal(data, &fields); err != nil {
			return false, err
		}
		return match(fields), nil
	}, nil
}

var filterTokenRE = regexp.MustCompile(`[()]|!=|<=|>=|[=:<>]|"(?:[^"\\]|\\.)*"|[^\s()=:<>!"]+|\S`)

type filterParser struct {
	tokens []string
	err    error
}

type condition func(fields map[string]any) bool

func (p *filterParser) peek() string {
	if len(p.tokens) == 0 {
		return ""
	}
	return p.tokens[0]
}

func (p *filterParser) next() string {
	t := p.peek()
	if t != "" {
		p.tokens = p.tokens[1:]
	}
	return t
}

// fail stops the parser at the next token.
func (p *filterParser) fail() condition {
	if p.err == nil {
		p.err = fmt.Errorf("did not expect %q", p.peek())
	}
	p.tokens = nil
	return nil
}

func (p *filterParser) or() condition {
	left := p.and()
	for p.peek() == "OR" {
		p.next()
		a, b := left, p.and()
		left = func(f map[string]any) bool { return a(f) || b(f) }
	}
	return left
}

func (p *filterParser) and() condition {
	left := p.not()
	for t := p.peek(); t != "" && t != "OR" && t != ")"; t = p.peek() {
		if t == "AND" {
			p.next()
		}
		a, b := left, p.not()
		left = func(f map[string]any) bool { return a(f) && b(f) }
	}
	return left
}

func (p *filterParser) not() condition {
	if p.peek() == "NOT" {
		p.next()
		a := p.not()
		return func(f map[string]any) bool { return !a(f) }
	}
	if p.peek() != "(" {
		return p.comparison()
	}
	p.next()
	inner := p.or()
	if p.peek() != ")" {
		return p.fail()
	}
	p.next()
	return inner
}

func (p *filterParser) comparison() condition {
	field, op, quoted := p.next(), p.next(), p.next()
	value := quoted
	if strings.HasPrefix(quoted, `"`) {
		unquoted, err := strconv.Unquote(quoted)
		if err != nil {
			return p.fail()
		}
		value = unquoted
	}
	if quoted == "" {
		return p.fail()
	}
	var holds func(got string, there bool) bool
	switch op {
	case "=":
		holds = func(got string, _ bool) bool { return got == value }
	case "!=":
		holds = func(got string, _ bool) bool { return got != value }
	case ":":
		prefix, wild := strings.CutSuffix(value, "*")
		holds = func(got string, there bool) bool {
			return there && (got == value || wild && strings.HasPrefix(got, prefix))
		}
	case "<", "<=", ">", ">=":
		holds = func(got string, there bool) bool {
			order := compare(got, value)
			return there && (order < 0 && op[0] == '<' || order > 0 && op[0] == '>' || order == 0 && len(op) == 2)
		}
	case "eq", "ne":
		re, err := regexp.Compile("^(?:" + value + ")$")
		if err != nil {
			p.err = err
			return p.fail()
		}
		holds = func(got string, _ bool) bool { return re.MatchString(got) == (op == "eq") }
	default:
		p.err = fmt.Errorf("%q is no operator", op)
		return p.fail()
	}
	return func(fields map[string]any) bool { return holds(lookUp(fields, field)) }
}

// lookUp is a field by its name, as in "labels.app", as text.
func lookUp(fields map[string]any, name string) (string, bool) {
	var value any = fields
	for part := range strings.SplitSeq(name, ".") {
		m, _ := value.(map[string]any)
		value = m[part]
	}
	if value == nil {
		return "", false
	}
	return fmt.Sprint(value), true
}

func compare(a, b string) int {
	x, errX := strconv.ParseFloat(a, 64)
	y, errY := strconv.ParseFloat(b, 64)
	switch {
	case errX != nil || errY != nil:
		return strings.Compare(a, b)
	case x < y:
		return -1
	case x > y:
		return 1
	}
	return 0
}
