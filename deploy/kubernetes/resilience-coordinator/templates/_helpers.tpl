{{- define "coordinator.name" -}}
{{- printf "%s-coordinator" .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "coordinator.selector" -}}
app.kubernetes.io/name: resilience-coordinator
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "coordinator.labels" -}}
{{ include "coordinator.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | quote }}
{{- end -}}

{{- define "coordinator.tokenSecret" -}}
{{- .Values.token.existingSecret | default (printf "%s-token" (include "coordinator.name" .)) -}}
{{- end -}}

{{- define "coordinator.tlsSecret" -}}
{{- if .Values.tls.certManager.enabled -}}
{{- printf "%s-tls" (include "coordinator.name" .) -}}
{{- else -}}
{{- required "tls.enabled needs tls.existingSecret (ca.crt, tls.crt, tls.key) or tls.certManager.enabled" .Values.tls.existingSecret -}}
{{- end -}}
{{- end -}}

{{- define "coordinator.address" -}}
{{- printf "%s.%s.svc:%v" (include "coordinator.name" .) .Release.Namespace .Values.service.grpcPort -}}
{{- end -}}
